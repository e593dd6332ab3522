"""Run every tiny recipe and the chain as shipped, and record their results, which README and docs quote.

    python -m benchmarks.tiny_recipes                  # all, half an hour on two idle cores
    python -m benchmarks.tiny_recipes classify embed   # some; the records of the others are kept

Writes benchmarks/results/tiny_recipes.json: metrics and output of each run, with commit, processor and versions.
`tests/test_figures.py` compares the figures in README, YAML comments and docs with this file. Needs the demo
data, which `make demo-data` fetches. Nothing else should run on the machine.
"""

import argparse
import json
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/tiny_recipes.json"
TINY = "recipes/configs/tiny"
HALF_BUDGET = 409_600  # of tiny/pretrain_clm, for the two runs that compare fill-in-the-middle with plain text

# In this order: the downstream tasks start from the masked model.
RECIPES = ("pretrain_clm", "pretrain_mlm", "pretrain_span", "classify", "tag", "embed")
CLM = ["recipes/pretrain_clm.py", "--config", f"{TINY}/pretrain_clm.yaml"]
RUNS = {name: [f"recipes/{name}.py", "--config", f"{TINY}/{name}.yaml"] for name in RECIPES} | {
    "half_budget": [*CLM, f"--train_tokens={HALF_BUDGET}"],
    "half_budget_fim": [*CLM, f"--train_tokens={HALF_BUDGET}", "--fim_rate=0.5"],
    "stream": [*CLM, "--stream=true"],
    "chain": ["scripts/run_chain.py", "recipes/chains/tiny.yaml"],
}
TOKENIZERS = ("outputs/tiny/tokenizer", "outputs/tiny/tokenizer-wordpiece", "outputs/tiny/tokenizer-unigram")


def run(name: str) -> dict:
    """Run one of `RUNS` from scratch. Returns its command, output and metrics."""
    folder = ROOT / "outputs/chains/tiny" if name == "chain" else ROOT / "outputs/tiny" / name
    shutil.rmtree(folder, ignore_errors=True)
    command = list(RUNS[name])
    if name != "chain":
        command.append(f"--output_dir={folder.relative_to(ROOT)}")
    process = subprocess.run(
        [sys.executable, *command], cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE, stderr=sys.stderr
    )
    result = {"command": " ".join(["python", *command]), "console": process.stdout.splitlines()}
    if name != "chain":
        return result | {"metrics": read_json(folder / "metrics.json")}
    stages = read_json(folder / "chain.json")["stages"]
    result["stages"] = {
        stage["name"]: {"seconds": stage["seconds"], "metrics": read_json(folder / stage["folder"] / "metrics.json")}
        for stage in stages
    }
    result["seconds"] = sum(stage["seconds"] for stage in stages)
    return result


def read_json(file: Path) -> dict:
    """The content of a file, or an empty dictionary where there is none (a tokenizer has no metrics)."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="run", help=f"some of {', '.join(RUNS)} (default: all)")
    args = parser.parse_args()

    from unlabeled.reporting.versions import git_state, installed_versions

    for tokenizer in TOKENIZERS:
        subprocess.run(["make", "--silent", tokenizer], cwd=ROOT, check=True)
    results = read_json(RESULTS)
    git = git_state()  # before the results file changes
    for name in args.runs or RUNS:
        print(f"{name} ...", flush=True)
        result = run(name)
        result |= {
            "date": date.today().isoformat(),
            "processor": describe_processor(),
            "git": git,
            "versions": installed_versions(),
        }
        results[name] = result
        RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def describe_processor() -> str:
    """The processor, its number of threads, and its vector extensions."""
    import torch

    capabilities = torch.cpu.get_capabilities()
    flags = [flag for flag in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if capabilities.get(flag)]
    return f"{capabilities.get('cpu_name', 'unknown')}, {torch.get_num_threads()} threads, {' '.join(flags)}"


if __name__ == "__main__":
    main()
