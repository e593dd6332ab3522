"""Why two runs are not the same run, in a sentence for users."""

import json

# Keys of a run's identity.
CONTENTS = "contents"  # {key or file of the run: {part: hash}} of the files that the run has read
NAMES = "names"  # {key or file of the run: path}; the files may move
LONGEST_VALUE = 60  # characters of a value in a message

# The order in which differing keys are looked at; others come first. Some keys follow from others, and the message is
# to name the key that the user can set back: the hash of the text follows from the tokenizer, among other things, the
# rows follow from the text, and counts of tokens and mappings follow from other keys.
_RANKS = {CONTENTS: 1, "text": 2, "rows": 3}
_RANK_OF_TOKENS = 4
_RANK_OF_MAPPINGS = 5


def describe_difference(output_dir: str, earlier: dict, current: dict) -> str | None:
    """Describe the first difference between the run that is recorded in a folder and the current one.

    Args:
        output_dir: The folder, for the message.
        earlier: The identity of the run in the folder.
        current: The identity of this run.

    Returns:
        A sentence that names what has changed and the remedy, or None if the runs are the same.
    """
    if CONTENTS in current and CONTENTS not in earlier:
        return (
            f"{output_dir} holds a run of an earlier version of this code, which did not record what its model holds; "
            "finish it with that version, or set output_dir to another folder"
        )
    keys = (earlier.keys() | current.keys()) - {NAMES}
    for key in sorted(keys, key=lambda key: (_rank(key, current), key)):
        if earlier.get(key) != current.get(key):
            return _describe_key(output_dir, key, earlier, current)
    return None


def _rank(key: str, current: dict) -> int:
    if key in _RANKS:
        return _RANKS[key]
    if isinstance(current.get(key), dict):
        return _RANK_OF_MAPPINGS
    return _RANK_OF_TOKENS if key.endswith("_tokens") else 0


def _describe_key(output_dir: str, key: str, earlier: dict, current: dict) -> str:
    """Describe the difference in one key."""
    if key == CONTENTS:
        return _describe_content(output_dir, earlier, current)
    if key == "text":
        return (
            f"{output_dir} holds a run on another text than train_data, eval_data and test_data have now, or one "
            "that was prepared in another way; set output_dir to another folder, or put the text back"
        )
    if key == "rows":
        return (
            f"{output_dir} holds a run on other rows of the same text, as other versions of the libraries prepare "
            "them; install those versions again, or set output_dir to another folder"
        )
    return (
        f"{output_dir} holds a run with {key} {_format_value(earlier.get(key))}, not "
        f"{_format_value(current.get(key))}; set output_dir to another folder, or the key back"
    )


def _describe_content(output_dir: str, earlier: dict, current: dict) -> str:
    """Describe which files have another content than when the run began."""
    for key in sorted(earlier[CONTENTS].keys() | current[CONTENTS].keys()):
        earlier_hashes = earlier[CONTENTS].get(key, {})
        current_hashes = current[CONTENTS].get(key, {})
        parts = sorted(earlier_hashes.keys() | current_hashes.keys())
        differing = [part for part in parts if earlier_hashes.get(part) != current_hashes.get(part)]
        if not differing:
            continue
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        earlier_name = earlier.get(NAMES, {}).get(key)
        current_name = current.get(NAMES, {}).get(key)
        if earlier_name != current_name:
            source = f"{key} (then {earlier_name}, now {current_name})"
        else:
            source = f"{key} {current_name}" if current_name else key
        return (
            f"{output_dir} holds a run that began with another {differing[0]}{more} of {source}; set output_dir to "
            "another folder, or put back what it began with"
        )
    raise ValueError("the contents are equal")


def _format_value(value: object) -> str:
    text = "its default" if value is None else json.dumps(value)
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + "..."
