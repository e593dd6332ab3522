"""Plan a run: size, memory, time, cost. Starts from a budget, a size, a text or the YAML file of a recipe.

    python scripts/plan.py --flops 1e20
    python scripts/plan.py --gpus 8 --hours 24 --device H100 --usd_per_gpu_hour 2.5
    python scripts/plan.py --parameters 124e6 --device "RTX 4090"
    python scripts/plan.py --config recipes/configs/gpt2-124m/pretrain_clm.yaml --device H100
    python scripts/plan.py --hours 1 --measured outputs/tiny/pretrain_clm --data data/demo/shakespeare/train.parquet \\
        --tokenizer outputs/tiny/tokenizer --write recipes/configs/mine/pretrain_clm.yaml

No weights are loaded. Time and price follow from --mfu, an assumption, or from --measured, a run of your own.
"""

import argparse
import json
import shlex
import sys
from dataclasses import fields

from unlabeled import exit_on_user_error
from unlabeled.planner.config_writer import check_writable_plan, write_recipe_config
from unlabeled.planner.options import PlanOptions
from unlabeled.planner.plan import make_plan
from unlabeled.planner.report import format_plan
from unlabeled.planning.scaling_laws import LAWS, ScalingLaw


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    start = parser.add_argument_group("starting point")
    start.add_argument("--flops", type=float, help="compute budget")
    start.add_argument("--hours", type=float, help="hours on --gpus of --device")
    start.add_argument("--price", type=float, help="price in USD, with --usd_per_gpu_hour")
    start.add_argument("--parameters", type=float, help="size of the model, embeddings included")
    start.add_argument("--tokens", type=float, help="tokens to train on")
    start.add_argument("--data", help="text: a file, folder or glob, as in train_data")
    start.add_argument("--config", help="YAML file of a recipe, planned as it is")
    start.add_argument("--recipe", help="recipe of --config (default: the name of the file begins with it)")
    model = parser.add_argument_group("model and scaling law")
    model.add_argument("--tokenizer", help="folder of a tokenizer; gives the vocabulary and bytes per token")
    model.add_argument("--vocab_size", type=int, help="default: that of --tokenizer, or 32,768")
    model.add_argument("--max_length", type=int, help="tokens in a row (default: 2,048, or that of --config)")
    model.add_argument("--labels", type=int, default=2, help="classes or tags of a --config with labels (default: 2)")
    model.add_argument("--law", default="besiroglu", help=f"{', '.join(LAWS)} or a JSON file (default: besiroglu)")
    model.add_argument("--fit", nargs="+", metavar="RUN", help="fit the law to finished runs of your own")
    model.add_argument("--tokens_per_parameter", type=float, help="a fixed ratio instead of the optimum of the law")
    hardware = parser.add_argument_group("hardware")
    hardware.add_argument("--device", help="H100, 'A100 80GB', 'RTX 4090', ..., or cpu, for the memory alone")
    hardware.add_argument("--gpus", type=int, default=1, help="number of devices (default: 1)")
    hardware.add_argument("--mfu", type=float, default=0.4, help="model FLOPs utilization to assume (default: 0.4)")
    hardware.add_argument("--measured", metavar="RUN", help="folder of a finished run, for its device and speed")
    hardware.add_argument("--usd_per_gpu_hour", type=float, help="price of a device")
    hardware.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print the plan as JSON")
    output.add_argument("--figure", metavar="PNG", help="plot the predicted loss over size and tokens")
    output.add_argument("--write", metavar="YAML", help="write a YAML file that recipes/pretrain_clm.py runs as it is")
    return parser.parse_args()


def main() -> None:
    args = parse_options()
    options = PlanOptions(**{member.name: getattr(args, member.name) for member in fields(PlanOptions)})
    if args.write:
        check_writable_plan(options)
    plan = make_plan(options)
    if args.figure:
        from unlabeled.reporting.plots import plot_budget

        law = ScalingLaw(**{member.name: plan["law"][member.name] for member in fields(ScalingLaw)})
        plot_budget(law, plan["model"]["total"], plan["tokens"], args.figure)
    if args.write:
        write_recipe_config(args.write, plan, options, command=f"python scripts/plan.py {shlex.join(sys.argv[1:])}")
    print(json.dumps(plan, indent=1) if args.json else format_plan(plan))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
