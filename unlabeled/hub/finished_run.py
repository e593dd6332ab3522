"""The push of a run that finished before, for a command that is run again."""

from contextlib import suppress
from pathlib import Path

from transformers import TrainingArguments

from unlabeled.hub.push import push
from unlabeled.hub.push_record import pushed_to
from unlabeled.runtime.run_lock import hold_output_dir


def report_finished_run(args: TrainingArguments) -> None:
    """Say that a run has finished, and push its folder if `push_to_hub` is set and no push is recorded.

    The first run may have been killed or disconnected during its push, or the folder is to be pushed to another
    repository now.

    Raises:
        UserError: As `push` does, or another process uses the folder.
    """
    if args.process_index:
        return
    print(f"{args.output_dir} holds this run, finished; delete the folder to train again")
    if not args.push_to_hub:
        return
    name = args.hub_model_id or Path(args.output_dir).absolute().name
    with suppress(OSError):  # a read-only folder, in which no run trains
        hold_output_dir(args.output_dir)  # the run itself may still be pushing
    repo_id = pushed_to(args.output_dir, name, args.hub_revision)
    if repo_id:
        print(f"it has been pushed to {repo_id}")
        return
    print(f"it has not been pushed to {name} yet, which is done now", flush=True)
    push(
        args.output_dir,
        name,
        private=args.hub_private_repo is not False,
        token=args.hub_token,
        revision=args.hub_revision,
        message="End of training",
    )
