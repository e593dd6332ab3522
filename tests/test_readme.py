"""README and docs: every command runs, every link and path exists, and every anchor is a heading."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

# Pages whose commands run, in the order in which a reader meets them: commands use the output of earlier ones.
GUIDES = [
    ROOT / name
    for name in (
        "README.md",
        "docs/data.md",
        "docs/pretraining.md",
        "docs/fine_tuning.md",
        "docs/downstream.md",
        "docs/chains.md",
        "docs/scaling.md",
    )
]
PAGES = sorted({ROOT / "README.md", *ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("experiments/*/README.md")})
PAGE_NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
# Launchers, clusters and servers, which other tests start: test_equality, test_multinode, test_slurm, test_serve.
TESTED_ELSEWHERE = ("accelerate launch", "torchrun", "sbatch", "RANK=", "transformers serve", "curl")
PLACEHOLDERS = ("NAME", "MODEL", "mine/")  # in paths of files that the reader is about to write
FINISHED_RUNS = (
    "tiny/pretrain_clm",
    "tiny/pretrain_mlm",
    "tiny/pretrain_span",
    "tiny/classify",
    "tiny/embed",
    "tiny/sft_lora",
    "tiny/sft_merged",
    "seed1",
    "mine/model",
    "continued",
    "streamed",
    "chains/tiny/4-dpo",
)


def commands(page: Path) -> list[str]:
    """The lines of the bash blocks of a page; continued lines are joined, comments removed."""
    lines = []
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
        lines += block.replace("\\\n", " ").splitlines()
    return [command for line in lines if (command := line.split("  #")[0].strip())]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of the headings of a page."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    names: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        slug = re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-")
        number = sum(name == slug or re.fullmatch(rf"{re.escape(slug)}-\d+", name) is not None for name in names)
        names.add(f"{slug}-{number}" if number else slug)
    return names


@pytest.mark.parametrize("page", PAGES, ids=PAGE_NAMES)
def test_links(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{target}: no such file"
        if anchor:
            assert anchor in anchors(linked), f"{target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=PAGE_NAMES)
def test_named_paths(page):
    if page.name == "CHANGELOG.md":
        pytest.skip("it names files that are gone")
    text = page.read_text(encoding="utf-8")
    folders = "recipes|scripts|ds_configs|unlabeled|docs|tests|benchmarks|experiments"
    names = re.findall(rf"`((?:{folders})/[\w./-]*)`", text)
    names += re.findall(r"(?:--config|--config_file) ((?:recipes|ds_configs)/\S+?\.yaml)", text)
    names += [f"tests/{name}" for name in re.findall(r"`(test_\w+\.py)`", text)]
    for name in names:
        if not any(placeholder in name for placeholder in PLACEHOLDERS):
            assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=PAGE_NAMES)
def test_named_functions(page):
    """A name that a page places in a module is defined or used there."""
    for name, module in re.findall(r"`(\w+)` in\s+`(unlabeled/[\w/]+\.py)`", page.read_text(encoding="utf-8")):
        assert re.search(rf"\b{name}\b", (ROOT / module).read_text(encoding="utf-8")), f"{name} in {module}"


def test_no_placeholders():
    for path in [*PAGES, *(ROOT / "recipes").rglob("*.yaml")]:
        text = path.read_text(encoding="utf-8")
        assert "<<" not in text and "TODO" not in text, path


def test_every_page_is_linked_from_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in ROOT.glob("docs/*.md"):
        assert f"(docs/{page.name}" in readme, page.name


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The working tree as a fresh clone would have it, with this environment as its `.venv` and shorter runs."""
    folder = tmp_path_factory.mktemp("clone")
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in files.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    for name in ("requirements.txt", "pyproject.toml"):
        os.utime(folder / name, (0, 0))  # newer than .venv, make would install this copy into it
    (folder / ".venv").unlink(missing_ok=True)
    (folder / ".venv").symlink_to(ROOT / ".venv")
    (folder / "data").mkdir(exist_ok=True)
    if (ROOT / "data" / "demo").exists():
        (folder / "data" / "demo").symlink_to(ROOT / "data" / "demo")
    write_own_text(folder / "mytext")
    for config in (folder / "recipes" / "configs" / "tiny").glob("*.yaml"):
        shorten(config)
    return folder


def write_own_text(folder: Path) -> None:
    """The reader's own text: forty files of lines from this project's documents."""
    lines = [line for page in PAGES for line in page.read_text(encoding="utf-8").splitlines()]
    lines += (ROOT / "LICENSE").read_text(encoding="utf-8").splitlines()
    folder.mkdir()
    for part in range(40):
        (folder / f"{part}.txt").write_text("\n".join(lines[part::7]), encoding="utf-8")


def shorten(config: Path) -> None:
    """Give a tiny configuration a budget of some twenty steps."""
    text = re.sub(r"^train_tokens: [\d_]+", "train_tokens: 40_960", config.read_text(encoding="utf-8"), flags=re.M)
    text = re.sub(r"^train_(pairs|examples): [\d_]+", r"train_\1: 64", text, flags=re.M)
    budget = yaml.safe_load(text)
    assert budget.get("train_tokens") == 40_960 or 64 in (budget.get("train_pairs"), budget.get("train_examples"))
    config.write_text(text, encoding="utf-8")


@pytest.mark.slow
def test_commands(clone):
    """The commands of all guides run in order, in one folder, as a reader would run them; repeated ones run once."""
    environment = os.environ | {"PYTHONPATH": str(clone), "PATH": f"{ROOT / '.venv/bin'}:{os.environ['PATH']}"}
    distinct = dict.fromkeys(command for page in GUIDES for command in commands(page))
    to_run = [command for command in distinct if not command.startswith(TESTED_ELSEWHERE)]
    assert len(to_run) >= 15
    for command in to_run:
        result = subprocess.run(command, shell=True, cwd=clone, capture_output=True, text=True, env=environment)
        expected = (0, 1) if "doctor.py" in command else (0,)  # 1: something of this machine needs attention
        message = f"{shlex.quote(command)}\n{result.stdout[-1500:]}\n{result.stderr[-1500:]}"
        assert result.returncode in expected, message
    for name in FINISHED_RUNS:
        finished = ("metrics.json", "merge.json", "config.json")
        assert any((clone / "outputs" / name / file).exists() for file in finished), name
