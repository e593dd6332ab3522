"""The README's commands run, its links lead somewhere, and its figures are those of the runs it names."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip()
]


def test_every_path_that_is_named_exists():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
    for name in re.findall(r"`((?:recipes|scripts|ds_configs|unlabeled|docs)/[\w./-]*)`", README):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"(?:--config|--config_file) (\S+?\.yaml)", README):
        assert (ROOT / name).exists(), name


def test_nothing_is_left_to_fill_in():
    assert "<<" not in README and "TODO" not in README
    for path in (ROOT / "recipes").rglob("*.yaml"):
        assert "<<" not in path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The working tree as a fresh clone would have it, with this environment for its `.venv`."""
    folder = tmp_path_factory.mktemp("clone")
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in files.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    for name in ("requirements.txt", "pyproject.toml"):
        os.utime(folder / name, (0, 0))  # newer than .venv, make would install this copy into it
    (folder / ".venv").symlink_to(ROOT / ".venv")
    (folder / "data").mkdir()
    if (ROOT / "data" / "demo").exists():
        (folder / "data" / "demo").symlink_to(ROOT / "data" / "demo")
    (folder / "mytext").mkdir()
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines() + (ROOT / "LICENSE").read_text().splitlines()
    for part in range(40):
        (folder / "mytext" / f"{part}.txt").write_text("\n".join(lines[part::7]), encoding="utf-8")
    for path in (folder / "recipes" / "configs" / "tiny").glob("*.yaml"):  # the same commands on a shorter run
        text = re.sub(r"^train_tokens: [\d_]+", "train_tokens: 40_960", path.read_text(encoding="utf-8"), flags=re.M)
        text = re.sub(r"^train_(pairs|examples): [\d_]+", r"train_\1: 64", text, flags=re.M)
        config = yaml.safe_load(text)
        assert config.get("train_tokens") == 40_960 or 64 in (config.get("train_pairs"), config.get("train_examples"))
        path.write_text(text, encoding="utf-8")
    return folder


@pytest.mark.slow
def test_the_commands_of_the_readme_run(clone):
    """In order, in one folder, as a reader would; launchers and the server have tests of their own."""
    environment = os.environ | {"PYTHONPATH": str(clone), "PATH": f"{ROOT / '.venv/bin'}:{os.environ['PATH']}"}
    ran = 0
    for command in COMMANDS:
        command = command.split("  #")[0].strip()
        if command == "make test" or command.startswith(("accelerate launch", ".venv/bin/transformers serve", "curl")):
            continue
        done = subprocess.run(command, shell=True, cwd=clone, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, f"{shlex.quote(command)}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
        ran += 1
    assert ran >= 5
    names = (
        "tiny/pretrain_clm",
        "tiny/pretrain_span",
        "tiny/classify",
        "tiny/embed",
        "seed1",
        "mine/model",
        "continued",
        "streamed",
    )
    for name in (*names, "chains/tiny/4-dpo"):
        assert (clone / "outputs" / name / "metrics.json").exists(), name
