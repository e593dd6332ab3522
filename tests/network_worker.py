"""Run several recipes and scripts in one process, so that everything is imported only once.

    python tests/network_worker.py commands.json

`commands.json` is a list of [file, argument, ...].
"""

import json
import os
import runpy
import sys
from pathlib import Path

from conftest import reset_accelerator_state

if __name__ == "__main__":
    for file, *arguments in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        reset_accelerator_state()
        sys.argv = [file, *arguments]
        print(f"--- {os.path.basename(file)}", flush=True)
        runpy.run_path(file, run_name="__main__")
