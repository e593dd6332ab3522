"""Push a finished folder to the Hub, and load it back from there.

    python scripts/push_to_hub.py outputs/tiny/pretrain_clm --repo-id NAME/REPO --dry-run
    python scripts/push_to_hub.py outputs/tiny/pretrain_clm --repo-id NAME/REPO

The repository is private unless --public is given. The token comes from HF_TOKEN or `hf auth login`. Only files that a
run writes are sent, and those that --include names; all of them are searched for secrets first. If the push is
interrupted, the same command continues with the files that have not arrived.
"""

import argparse

from unlabeled import exit_on_user_error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="output_dir of a finished run")
    parser.add_argument("--repo-id", required=True, help="the repository, NAME/REPO; created if it does not exist")
    parser.add_argument("--public", action="store_true", help="let everybody read it")
    parser.add_argument("--revision", metavar="BRANCH", help="an existing branch (default: the main one)")
    parser.add_argument(
        "--include",
        metavar="FILE",
        action="append",
        default=[],
        help="another file of the folder to push, such as LICENSE; repeatable",
    )
    parser.add_argument("--dry-run", action="store_true", help="list and check the files, send nothing")
    args = parser.parse_args()

    from unlabeled.hub.push import push  # imports torch, which --help does not need

    push(
        args.folder,
        args.repo_id,
        private=not args.public,
        dry_run=args.dry_run,
        revision=args.revision,
        include=args.include,
    )


if __name__ == "__main__":
    with exit_on_user_error():
        main()
