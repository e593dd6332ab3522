"""The stages of a chain: what its YAML says, what each stage reads of those before, and which of them are done.

A part of `python scripts/run_chain.py`, without a command of its own.
"""

import ast
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

import yaml

from unlabeled import UserError
from unlabeled.config.resume_keys import KEYS_FREE_TO_CHANGE_ON_RESUME
from unlabeled.data.files import local_files
from unlabeled.data.sources import Source, parse_sources
from unlabeled.hub.push_record import pushed_to
from unlabeled.runtime.files import file_sha256, read_optional_json, read_small_file, write_json
from unlabeled.runtime.secrets import check_no_secret, yaml_problem

ROOT = Path(__file__).resolve().parents[1]
FILES = {"tokenizer": "scripts/train_tokenizer.py", "prepare": "scripts/prepare_data.py"}
ON_A_FOLDER = {"merge": "scripts/merge_adapter.py", "evaluate": "scripts/evaluate_model.py",
               "push": "scripts/push_to_hub.py"}  # fmt: skip
FILES |= ON_A_FOLDER | {path.stem: f"recipes/{path.name}" for path in sorted((ROOT / "recipes").glob("*.py"))}
# What a finished stage leaves in its folder, at least. The recipes write metrics.json last.
LEAVES = {"tokenizer": ["tokenizer.json"], "prepare": ["*/manifest.json"], "merge": ["*.safetensors"],
          "evaluate": ["*"], "push": []}  # fmt: skip
DATA_KEYS = ("train_data", "eval_data", "test_data", "data", "tasks")
MODEL_KEYS = ("model_name_or_path", "tokenizer_name_or_path", "folder")
# What a resumed run may change does not make it another run. Data and models count by their content, see `content`.
UNCOUNTED = (KEYS_FREE_TO_CHANGE_ON_RESUME | {"prepared_dir", "env"}) - {*DATA_KEYS, *MODEL_KEYS}
# What makes two folders the same to the stage that reads them.
READ = ("*.safetensors", "base/*.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "config.json", "generation_config.json", "adapter_config.json")  # fmt: skip


# What chain.json has of each stage.
ENTRY = {"name": str, "kind": str, "folder": str, "seconds": int | float, "fingerprint": str, "parts": dict}


@dataclass
class Stage:
    number: int
    kind: str
    name: str
    config: str | None
    own: dict  # what the chain's YAML says
    keys: dict  # the same, with the configuration underneath
    folder: str
    given: dict = field(default_factory=dict)  # key: folder of a stage before, or None to take back the configuration's
    state: str = "to do"  # or done, interrupted, changed
    why: str = ""
    parts: dict = field(default_factory=dict)  # what the fingerprint is of

    @property
    def values(self) -> dict:
        return {key: value for key, value in (self.keys | self.given).items() if value not in (None, "null")}

    @property
    def lacks(self) -> str:
        """What is not in the folder although a finished stage leaves it there."""
        wanted = LEAVES.get(self.kind, ["metrics.json", "*.safetensors"])
        return " and ".join(name for name in wanted if not any(Path(self.folder).glob(name)))

    @property
    def has_to_push(self) -> bool:
        """Whether `push_to_hub` of a recipe asks for a push that is not recorded in the folder."""
        if FILES[self.kind].startswith("scripts/") or str(self.values.get("push_to_hub")).lower() != "true":
            return False
        name = self.values.get("hub_model_id") or os.path.basename(self.folder)
        return pushed_to(self.folder, name, self.values.get("hub_revision")) is None

    @property
    def label(self) -> str:
        return f"{self.number}-{self.name}"


def digest(value) -> str:
    return f"sha256:{hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()}"


def read_yaml(path: str) -> dict:
    try:
        value = yaml.safe_load(read_small_file(path))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML; correct it: {yaml_problem(error)}") from error
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"cannot read {path} ({reason}); correct it, or name another YAML file") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no keys; recipes/chains/ and recipes/configs/ have examples")
    return value


def check_key(where: str, key, known) -> None:
    if key not in known:
        nearest = get_close_matches(str(key), list(known), 1, 0)[0]
        raise UserError(f"{where}: unknown {key!r}; did you mean {nearest!r}?")


def relative(path: str | Path) -> str:
    """A path as a YAML has it: from the repository, where it is inside."""
    path = os.path.abspath(path)
    return os.path.relpath(path, ROOT) if path.startswith(f"{ROOT}{os.sep}") else path


def options_of(kind: str) -> dict[str, str] | None:
    """Key to option of a recipe or script, from its source: to import one takes longer than to skip a whole chain."""
    file = ROOT / FILES[kind]
    if not file.exists():
        raise UserError(f"{FILES[kind]} is missing; leave out the stages of kind {kind}")
    if options := re.findall(r"add_argument\(\s*\"--([\w-]+)\"", file.read_text(encoding="utf-8")):
        return {option.replace("-", "_"): f"--{option}" for option in [*options, *["folder"] * (kind in ON_A_FOLDER)]}
    ours, transformers, trl = (Path(find_spec(name).origin).parent for name in ("unlabeled", "transformers", "trl"))
    sources = [*ours.rglob("*.py"), transformers / "training_args.py", *trl.glob("trainer/*_config.py"), file]
    nodes = [list(ast.walk(ast.parse(source.read_text(encoding="utf-8")))) for source in sources]
    classes = {node.name: node for tree in nodes for node in tree if isinstance(node, ast.ClassDef)}
    names = [name.name for node in nodes[-1] if isinstance(node, ast.ImportFrom) for name in node.names]
    own = [node.name for node in nodes[-1] if isinstance(node, ast.ClassDef) and node.decorator_list]  # its dataclasses
    taken = [classes[name] for name in names + own if name in classes and name.endswith("Arguments")]
    try:
        return {key: f"--{key}" for node in taken for key in ("env", *fields_of(node, classes))}
    except KeyError:  # a library has moved a class: the recipe will find out by itself
        return None


def fields_of(node: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> Iterator[str]:
    """The fields of a dataclass, with those of its bases."""
    for base in node.bases:
        yield from fields_of(classes[getattr(base, "id", None)], classes)
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and "ClassVar" not in ast.unparse(line.annotation):
            yield line.target.id


class Chain:
    """A chain's YAML, and what chain.json says was done."""

    def __init__(self, path: str, output_dir: str | None):
        content = read_yaml(path)
        for key in content:
            check_key(path, key, ("output_dir", "accelerate", "prompts", "stages"))
        self.path, self.name, self.hashes = path, Path(path).stem, {}
        self.folder, self.prompts = output_dir or content.get("output_dir"), content.get("prompts") or []
        self.accelerate, stages = content.get("accelerate", "ds_configs/single.yaml"), content.get("stages")
        for wrong, what in (
            (not isinstance(self.folder, str), "set output_dir to the folder in which the stages write theirs"),
            (
                not os.path.isfile(str(self.accelerate)),
                f"there is no {self.accelerate} for accelerate; see ds_configs/",
            ),
            (not isinstance(self.prompts, list), "prompts is no list; begin each line with '- '"),
            (not isinstance(stages, list) or not stages, "no stages; list them as recipes/chains/tiny.yaml does"),
        ):
            if wrong:
                raise UserError(f"{path}: {what}")
        self.stages = [self.read_stage(number, item) for number, item in enumerate(stages, 1)]
        names = [stage.name for stage in self.stages]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"{path}: two stages are called {twice[0]}; give one another `name`")
        self.read_state()

    def read_stage(self, number: int, item) -> Stage:
        where = f"{self.path}: stage {number}"
        kind, own = next(iter(item.items())) if isinstance(item, dict) and len(item) == 1 else (None, None)
        if kind is None or not isinstance(own or {}, dict):
            raise UserError(f"{where} is no `KIND: {{KEY: VALUE, ...}}`; write it as recipes/chains/tiny.yaml does")
        check_key(where, kind, FILES)
        own = dict(own or {})
        name, config = str(own.pop("name", kind)), own.pop("config", None)
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise UserError(f"{where}: name {name!r} is to name a folder; use letters, digits, '_', '-' and '.'")
        below, known = read_yaml(config) if config else {}, options_of(kind)
        check_no_secret(where, own)
        check_no_secret(str(config), below)
        if "env" in own:
            raise UserError(f"{where}: move env to the file that config names; a recipe has no such option")
        for key in ("output_dir", "prepared_dir") if kind == "prepare" else ("output_dir",):
            if key in own:
                raise UserError(f"{where}: remove {key}; each stage writes to a folder in that of the chain")
        for place, keys in ((where, own), (config, below)):
            for key in keys if known else ():
                check_key(place, key, known)
        return Stage(number, kind, name, config, own, below | own, os.path.join(self.folder, f"{number}-{name}"))

    def read_state(self) -> None:
        self.state, strangers = read_optional_json(f"{self.folder}/chain.json"), set()
        if not self.state and os.path.lexists(self.folder):
            files = os.listdir(self.folder) if os.path.isdir(self.folder) else ["no folder"]
            strangers = {*files} - {"logs", "chain.json.tmp"}
        if strangers or self.state.get("name", self.name) != self.name:
            found = f"no readable chain.json but {min(strangers)}" if strangers else f"the chain {self.state['name']!r}"
            raise UserError(f"{self.path}: output_dir {self.folder} holds {found}; set it to another folder")
        self.check_state()
        self.done = {entry["name"]: entry for entry in self.state.get("stages", [])}
        self.begun = self.state.get("started", {})
        known = read_optional_json(f"{self.folder}/logs/hashes.json")
        self.hashes |= {file: entry for file, entry in known.items() if isinstance(entry, list) and len(entry) == 3}

    def check_state(self) -> None:
        """Raise `UserError` where chain.json is not what `save` has written."""
        stages, started = self.state.get("stages", []), self.state.get("started", {})
        is_whole = isinstance(stages, list) and isinstance(started, dict)
        for entry in [*stages, *started.values()] if is_whole else ():
            is_whole = is_whole and isinstance(entry, dict)
            is_whole = is_whole and all(isinstance(entry.get(key), kind) for key, kind in ENTRY.items())
        for entry in started.values() if is_whole else ():
            is_whole = is_whole and isinstance(entry.get("at"), int | float)
        if not is_whole:
            raise UserError(
                f"{self.folder}/chain.json is damaged, so what was done is not known; restore it, or set output_dir to "
                "another folder"
            )

    def save(self, **more) -> None:
        """Whenever the chain is killed, the next one reads a state from which it ends in the same."""
        entries = [self.done[stage.name] for stage in self.stages if stage.name in self.done]
        self.state |= {"name": self.name, "prompts": self.prompts, "stages": entries, "started": self.begun, **more}
        try:
            write_json(f"{self.folder}/logs/hashes.json", self.hashes)
            write_json(f"{self.folder}/chain.json", self.state)
        except OSError as error:
            raise UserError(
                f"cannot write {self.folder}/chain.json ({error.strerror}); make room, run it again"
            ) from error

    # --- What a stage reads, and whether that has changed -----------------------------------------------------------

    def connect(self, stage: Stage, newest: dict[str, Stage]) -> None:
        """Hand on the folders of the stages before, unless the stage names its own."""
        pretrains = stage.kind.startswith("pretrain") or stage.kind == "prepare"
        if pretrains and stage.keys.get("model_type"):
            wanted = {"tokenizer_name_or_path": "tokenizer"}
        else:
            wanted = {"folder" if stage.kind in ON_A_FOLDER else "model_name_or_path": "model"}
        needed = [] if stage.kind == "tokenizer" else list(wanted)
        wanted |= {"prepared_dir": "prepare"} if stage.kind.startswith("pretrain") else {}
        stage.given = {key: newest[what].folder for key, what in wanted.items()
                       if what in newest and key not in stage.own and stage.kind != "tokenizer"}  # fmt: skip
        inherited = {*stage.keys} - {*stage.own}
        if "model_name_or_path" in stage.given and "tokenizer_name_or_path" in inherited:
            stage.given["tokenizer_name_or_path"] = None  # the model brings its own
        if lacking := [key for key in needed if key not in stage.values]:
            what = f"{self.path}: {stage.name} needs a {wanted[lacking[0]]}"
            raise UserError(f"{what} and no stage before it makes one; set {lacking[0]}")

    def check_sources(self) -> None:
        """Everything local that no stage makes is there, or a UserError; of demo data, all that has to be fetched."""
        absent: dict[str, str] = {}
        for stage in self.stages:
            for key, value in stage.values.items():
                where = f"{self.path}: {stage.name}: {key}"
                sources = [value] if key in MODEL_KEYS and key not in stage.given else []
                sources += parse_sources(value, where) if key in DATA_KEYS and value else []
                for source in sources:
                    absent |= self.check_source(where, source)
        if absent:
            command = f"python scripts/get_demo_data.py {' '.join(absent.values())}"
            raise UserError(f"{self.path} needs {', '.join(absent)}, not fetched yet; run `{command}`")

    @staticmethod
    def check_source(where: str, source: Source | str) -> dict[str, str]:
        """Folder and name of a demo source that has to be fetched; a UserError for another that is not there."""
        path = str(getattr(source, "path", source))
        if demo := re.match(r"(?:\./)?(?:data|models)/demo/([^/]+)", path):
            return {} if os.path.exists(demo[0]) else {demo[0]: demo[1]}
        try:
            if isinstance(source, Source):
                local_files(source)
            elif not os.path.isdir(path) and (os.path.isabs(path) or path.count("/") > 1):
                raise UserError(f"there is no folder {path}; correct the path")
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        return {}

    def sha256(self, file: str | Path) -> str:
        stat = os.stat(file)
        if self.hashes.get(str(file), [])[:2] != [stat.st_size, stat.st_mtime_ns]:
            self.hashes[str(file)] = [stat.st_size, stat.st_mtime_ns, file_sha256(str(file))]
        return self.hashes[str(file)][2]

    def content(self, key: str, value) -> object:
        """A value as it counts: of local files and folders what is in them, wherever they lie."""
        if key in MODEL_KEYS and os.path.isdir(value):
            return digest([[file.name, self.sha256(file)] for name in READ for file in sorted(Path(value).glob(name))])
        if key in DATA_KEYS and value:
            sources = [(vars(source), local_files(source)) for source in parse_sources(value, key)]
            return digest([source | ({"path": [self.sha256(file) for file in files]} if files else {})
                           for source, files in sources])  # fmt: skip
        return self.sha256(value) if isinstance(value, str) and os.path.isfile(value) else value

    def examine(self, stage: Stage, newest: dict[str, Stage]) -> None:
        """What is to be done about a stage, and why."""
        self.connect(stage, newest)
        record = self.done.get(stage.name) or self.begun.get(stage.name)
        if record and stage.kind != "push":  # it keeps its folder when stages are put before it
            stage.folder = os.path.join(self.folder, record["folder"])
        values = {key: self.content(key, value) for key, value in stage.values.items() if key not in UNCOUNTED}
        stage.parts = json.loads(json.dumps({"kind": stage.kind, **values}, default=str))
        before = record.get("parts", {}) if record else {}
        differ = [key for key in sorted(before.keys() | stage.parts) if before.get(key) != stage.parts.get(key)]
        waits = [
            name for name, other in newest.items() if other.folder in stage.given.values() and other.state != "done"
        ]
        stage.state, stage.why = "to do", f"after {newest[waits[0]].name}" if waits else ""
        there = stage.name in self.done if stage.kind == "push" else os.path.lexists(stage.folder)
        if waits or not there:
            return
        if record is None:
            stage.state, stage.why = "changed", "its folder was not made by this chain"
        elif differ:
            stage.state = "changed"
            stage.why = "; ".join(told(key, before.get(key), stage.parts.get(key)) for key in differ)
        elif stage.name in self.done and stage.lacks:
            stage.state, stage.why = "changed", f"{stage.lacks} is gone"
        elif stage.name in self.done and stage.has_to_push:
            stage.state, stage.why = "interrupted", "it has not been pushed"
        elif stage.name in self.done:
            stage.state = "done"
        else:
            stage.state = "interrupted"


def follow(newest: dict[str, Stage], stage: Stage) -> None:
    """Make a stage the newest of what its folder holds."""
    holds = {"tokenizer": "tokenizer", "prepare": "prepare", "evaluate": None, "push": None}.get(stage.kind, "model")
    newest |= {holds: stage} if holds else {}


def told(key: str, before, now) -> str:
    hashed = any(str(value).startswith("sha256:") for value in (before, now))
    return f"{key} has other content" if hashed else f"{key} {json.dumps(before)} -> {json.dumps(now)}"


def command_of(chain: Chain, stage: Stage) -> list[str]:
    """What runs a stage, from the root of the repository."""
    recipe, options = FILES[stage.kind].startswith("recipes/"), options_of(stage.kind) or {}
    launcher = ["-m", "accelerate.commands.launch", "--quiet", "--config_file", chain.accelerate]
    words = [relative(sys.executable), *(launcher if recipe else []), FILES[stage.kind]]
    words += [stage.values["folder"]] if stage.kind in ON_A_FOLDER else []
    words += ["--config", stage.config] if stage.config else []
    for key, value in (stage.given | stage.own).items():
        if key != "folder":
            words += as_words(options.get(key, f"--{key}"), value, flags=not recipe and stage.kind != "prepare")
    return words + {"prepare": ["--prepared_dir", stage.folder], "push": []}.get(
        stage.kind, ["--output_dir", stage.folder]
    )


def as_words(option: str, value, flags: bool) -> list[str]:
    """A key on the command line. `flags`: true is an option without a value; else as the recipes' parser has it."""
    if isinstance(value, bool) or value is None:
        return [option] * bool(value) if flags else [option, json.dumps(value)]
    if isinstance(value, dict) or (
        not flags and option in ("--train_data", "--eval_data", "--test_data") and isinstance(value, list)
    ):
        return [option, json.dumps(value)]
    return [option, *map(str, value if isinstance(value, list) else [value])]
