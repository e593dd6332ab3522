"""The plan of a chain: which folders each stage reads, and which stages are finished, have changed or are to do.

Paths are relative to the working directory, which is the root of the repository.
"""

import os
import re
from pathlib import Path
from typing import Any

from unlabeled.chain.commands import TAKES_FOLDER, stage_command, stage_options
from unlabeled.chain.contents import DATA_KEYS, MODEL_KEYS, ContentHashes, describe_change
from unlabeled.chain.stages import ChainStage, check_key, check_stage_keys, read_stages, read_yaml
from unlabeled.data.files import local_files
from unlabeled.data.sources import Source, parse_sources
from unlabeled.errors import UserError
from unlabeled.runtime.files import read_optional_json, write_json

CHAIN_KEYS = ("output_dir", "accelerate", "prompts", "stages")
# The keys of a stage in chain.json, and their types.
ENTRY_TYPES = {"name": str, "kind": str, "folder": str, "seconds": int | float, "fingerprint": str, "parts": dict}
# What the folder of a stage provides to later ones; all others provide a model.
PROVIDES = {"tokenizer": "tokenizer", "prepare": "prepare", "evaluate": None, "push": None}


class Chain:
    """A chain's YAML, and what its `chain.json` says was done.

    Args:
        path: the YAML of the chain.
        output_dir: the folder of the chain; default: that of the YAML.

    Attributes:
        options: of each kind of stage the options of its keys; see `stage_options`.
        finished: the entry in `chain.json` of each finished stage, by name.
        started: the entry of each stage that was started and has not ended.

    Raises:
        UserError: the YAML is not that of a chain, or the folder holds something else.
    """

    def __init__(self, path: str, output_dir: str | None = None):
        content = read_yaml(path)
        for key in content:
            check_key(path, key, CHAIN_KEYS)
        self.path = path
        self.name = Path(path).stem
        self.folder = output_dir or content.get("output_dir")
        self.accelerate = content.get("accelerate", "ds_configs/single.yaml")
        self.prompts = content.get("prompts") or []
        self.contents = ContentHashes()
        items = content.get("stages")
        if not isinstance(self.folder, str):
            raise UserError(f"{path}: set output_dir to the folder in which the stages write theirs")
        if not os.path.isfile(str(self.accelerate)):
            raise UserError(f"{path}: there is no {self.accelerate} for accelerate; see ds_configs/")
        if not isinstance(self.prompts, list):
            raise UserError(f"{path}: prompts is no list; begin each line with '- '")
        if not isinstance(items, list) or not items:
            raise UserError(f"{path}: no stages; list them as recipes/chains/tiny.yaml does")
        self.stages = read_stages(path, self.folder, items)
        self.options = stage_options(stage.kind for stage in self.stages)
        for stage in self.stages:
            check_stage_keys(path, stage, self.options[stage.kind])
        self.read_state()

    def command(self, stage: ChainStage) -> list[str]:
        """The command that runs a stage."""
        return stage_command(self.accelerate, stage, self.options[stage.kind])

    # --- chain.json -------------------------------------------------------------------------------------------------

    def read_state(self) -> None:
        """Read what was done, from the folder of the chain.

        Raises:
            UserError: the folder is another chain's or another program's, or chain.json is damaged.
        """
        self.state = read_optional_json(f"{self.folder}/chain.json")
        if not self.state and os.path.lexists(self.folder):
            files = os.listdir(self.folder) if os.path.isdir(self.folder) else ["no folder"]
            foreign_files = {*files} - {"logs", "chain.json.tmp"}
            if foreign_files:
                self._refuse_folder(f"no readable chain.json but {min(foreign_files)}")
        if self.state.get("name", self.name) != self.name:
            self._refuse_folder(f"the chain {self.state['name']!r}")
        if not self._is_state_valid():
            raise UserError(
                f"{self.folder}/chain.json is damaged, so what was done is not known; restore it, or set output_dir to "
                "another folder"
            )
        self.finished = {entry["name"]: entry for entry in self.state.get("stages", [])}
        self.started = self.state.get("started", {})
        hashes = read_optional_json(f"{self.folder}/logs/hashes.json")
        self.contents.hashes |= {
            file: entry for file, entry in hashes.items() if isinstance(entry, list) and len(entry) == 3
        }

    def _refuse_folder(self, content: str) -> None:
        raise UserError(f"{self.path}: output_dir {self.folder} holds {content}; set it to another folder")

    def _is_state_valid(self) -> bool:
        """Whether chain.json has what `save` writes."""
        finished = self.state.get("stages", [])
        started = self.state.get("started", {})
        if not isinstance(finished, list) or not isinstance(started, dict):
            return False
        for entry in [*finished, *started.values()]:
            if not isinstance(entry, dict):
                return False
            if not all(isinstance(entry.get(key), kind) for key, kind in ENTRY_TYPES.items()):
                return False
        return all(isinstance(entry.get("at"), int | float) for entry in started.values())

    def save(self, **more: Any) -> None:
        """Write chain.json, such that a chain that is killed at any moment ends in the same when it is run again.

        Args:
            more: other keys to record.
        """
        finished = [self.finished[stage.name] for stage in self.stages if stage.name in self.finished]
        self.state |= {"name": self.name, "prompts": self.prompts, "stages": finished, "started": self.started, **more}
        try:
            write_json(f"{self.folder}/logs/hashes.json", self.contents.hashes)
            write_json(f"{self.folder}/chain.json", self.state)
        except OSError as error:
            raise UserError(
                f"cannot write {self.folder}/chain.json ({error.strerror}); make room, run it again"
            ) from error

    # --- What a stage reads -----------------------------------------------------------------------------------------

    def connect(self, stage: ChainStage, latest: dict[str, ChainStage]) -> None:
        """Give a stage the folders of earlier stages, unless it names its own.

        Args:
            latest: the latest stage that provides a tokenizer, prepared text and a model; see `provide`.

        Raises:
            UserError: the stage needs a model or a tokenizer, and neither names one nor comes after one.
        """
        stage.inputs = {}
        if stage.kind == "tokenizer":
            return
        is_pretraining = stage.kind.startswith("pretrain")
        is_from_scratch = (is_pretraining or stage.kind == "prepare") and stage.keys.get("model_type")
        if is_from_scratch:
            required = {"tokenizer_name_or_path": "tokenizer"}
        elif stage.kind in TAKES_FOLDER:
            required = {"folder": "model"}
        else:
            required = {"model_name_or_path": "model"}
        optional = {"prepared_dir": "prepare"} if is_pretraining else {}
        for key, provided in (required | optional).items():
            if provided in latest and key not in stage.overrides:
                stage.inputs[key] = latest[provided].folder
        config_sets_tokenizer = "tokenizer_name_or_path" in stage.keys.keys() - stage.overrides.keys()
        if "model_name_or_path" in stage.inputs and config_sets_tokenizer:
            stage.inputs["tokenizer_name_or_path"] = None  # the model has its own
        for key, provided in required.items():
            if key not in stage.values:
                raise UserError(
                    f"{self.path}: {stage.name} needs a {provided} and no stage before it makes one; set {key}"
                )

    def connect_all(self) -> None:
        """Connect all stages, to find out whether each has what it needs."""
        latest: dict[str, ChainStage] = {}
        for stage in self.stages:
            self.connect(stage, latest)
            provide(latest, stage)

    def check_sources(self) -> None:
        """Check that all local files and folders exist that no stage makes.

        Raises:
            UserError: one does not, or demo data have to be fetched first.
        """
        unfetched: dict[str, str] = {}
        for stage in self.stages:
            for key, value in stage.values.items():
                where = f"{self.path}: {stage.name}: {key}"
                if key in MODEL_KEYS and key not in stage.inputs:
                    unfetched |= check_source(where, value)
                if key in DATA_KEYS and value:
                    for source in parse_sources(value, where):
                        unfetched |= check_source(where, source)
        if unfetched:
            command = f"python scripts/get_demo_data.py {' '.join(unfetched.values())}"
            raise UserError(f"{self.path} needs {', '.join(unfetched)}, not fetched yet; run `{command}`")

    # --- What is to be done -----------------------------------------------------------------------------------------

    def examine(self, stage: ChainStage, latest: dict[str, ChainStage]) -> None:
        """Find out the state of a stage, once those before it have been examined or run."""
        self.connect(stage, latest)
        record = self.finished.get(stage.name) or self.started.get(stage.name)
        if record and stage.kind != "push":  # it keeps its folder when stages are put before it
            stage.folder = os.path.join(self.folder, record["folder"])
        stage.parts = self.contents.stage_parts(stage.kind, stage.values)
        stage.state, stage.reason = self._find_state(stage, latest, record)

    def _find_state(self, stage: ChainStage, latest: dict[str, ChainStage], record: dict | None) -> tuple[str, str]:
        """The state of a stage and the reason for it."""
        for earlier in latest.values():
            if earlier.folder in stage.inputs.values() and earlier.state != "done":
                return "to do", f"after {earlier.name}"
        is_finished = stage.name in self.finished
        has_result = is_finished if stage.kind == "push" else os.path.lexists(stage.folder)
        if not has_result:
            return "to do", ""
        if record is None:
            return "changed", "its folder was not made by this chain"
        recorded = record["parts"]
        changes = [
            describe_change(key, recorded.get(key), stage.parts.get(key))
            for key in sorted(recorded.keys() | stage.parts.keys())
            if recorded.get(key) != stage.parts.get(key)
        ]
        if changes:
            return "changed", "; ".join(changes)
        if not is_finished:
            return "interrupted", ""
        if stage.missing_files:
            return "changed", f"{stage.missing_files} is gone"
        if stage.has_to_push:
            return "interrupted", "it has not been pushed"
        return "done", ""

    def examine_all(self) -> None:
        """Examine all stages, without running any."""
        latest: dict[str, ChainStage] = {}
        for stage in self.stages:
            self.examine(stage, latest)
            provide(latest, stage)


def provide(latest: dict[str, ChainStage], stage: ChainStage) -> None:
    """Make a stage the latest one that provides what its folder holds."""
    provided = PROVIDES.get(stage.kind, "model")
    if provided:
        latest[provided] = stage


def check_source(where: str, source: Source | str) -> dict[str, str]:
    """Check that a source of data or a model exists if it is local.

    Returns:
        The folder and the name of a demo source that has to be fetched first, empty for all others.

    Raises:
        UserError: a local file or folder does not exist.
    """
    path = str(getattr(source, "path", source))
    demo = re.match(r"(?:\./)?(?:data|models)/demo/([^/]+)", path)
    if demo:
        return {} if os.path.exists(demo[0]) else {demo[0]: demo[1]}
    try:
        if isinstance(source, Source):
            local_files(source)
        elif not os.path.isdir(path) and (os.path.isabs(path) or path.count("/") > 1):
            raise UserError(f"there is no folder {path}; correct the path")
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return {}
