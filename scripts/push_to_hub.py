"""Push a finished folder to the Hub, and load it back from there.

    python scripts/push_to_hub.py outputs/tiny/pretrain_clm --repo-id NAME/REPO --dry-run
    python scripts/push_to_hub.py outputs/tiny/pretrain_clm --repo-id NAME/REPO

The repository is private unless you say otherwise. The token comes from HF_TOKEN or `hf auth login`. Only files that a
run writes are sent, and those that --include names; all of them are searched for secrets first. If the push is
interrupted, the same command goes on with what has not arrived.
"""

import argparse

from unlabeled import exit_on_user_error


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="output_dir of a finished run")
    parser.add_argument("--repo-id", required=True, help="where it goes, as NAME/REPO; made if it is not there")
    parser.add_argument("--public", action="store_true", help="let everybody read it")
    parser.add_argument("--revision", metavar="BRANCH", help="a branch that is there, instead of the main one")
    extra = {"metavar": "FILE", "action": "append", "default": []}
    parser.add_argument(
        "--include", **extra, help="a file of the folder that goes as well, such as LICENSE; repeatable"
    )
    parser.add_argument("--dry-run", action="store_true", help="show what would go, check it, send nothing")
    args = parser.parse_args()

    from unlabeled.hub.push import push

    more = {"dry_run": args.dry_run, "revision": args.revision, "include": args.include}
    push(args.folder, args.repo_id, private=not args.public, **more)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
