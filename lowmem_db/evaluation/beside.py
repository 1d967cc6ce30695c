"""The images of several methods beside each other: the same subjects, and the same prompts in the same rows."""

from collections.abc import Sequence
from pathlib import Path

from lowmem_db.console import say
from lowmem_db.errors import DataError
from lowmem_db.evaluation.folders import Limits, SubjectFiles, find_subjects

Drawn = tuple[str | None, tuple[Path, ...]]
"""A prompt, or None if it is not known, with its images."""


def name_methods(folders: Sequence[Path], names: Sequence[str] = ()) -> list[str]:
    """Return a name for each folder: those given, the folders' own or, if these are the same, with their parents'.

    Raises:
        DataError: A folder is given twice, there are not as many names as folders, or their own names tell nothing.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise DataError("IMAGES: a folder is given twice; allowed: a different folder for each method")
    if names and len(names) != len(folders):
        raise DataError(
            f"--name: {len(names)} for {len(folders)} folders; allowed: one for each folder, in their order"
        )
    if names and (len({*names}) < len(names) or not all(name.strip() for name in names)):
        raise DataError("--name: a name is given twice, or empty; allowed: a different name for each folder")
    if names:
        return list(names)
    short = [folder.resolve().name for folder in folders]
    longer = [f"{folder.resolve().parent.name}/{name}" for folder, name in zip(folders, short, strict=True)]
    for own in (short, longer):
        if len({*own}) == len(own):
            return own
    raise DataError(f"--name: is needed, because several folders are called {short[0]}; give one for each folder")


def find_methods(folders: Sequence[Path], real: Path | None, limits: Limits) -> list[tuple[SubjectFiles, ...]]:
    """Return each subject that all methods have drawn, once for each method.

    Raises:
        DataError: A folder is missing or empty, pictures cannot be read, or the methods have no subject in common.
    """
    by_method = [{subject.name: subject for subject in find_subjects(each, real, None, limits)} for each in folders]
    common = [name for name in by_method[0] if all(name in others for others in by_method)]
    if not common:
        raise DataError("IMAGES: the folders have no subject in common; allowed: folders of the same subjects")
    if missing := sorted({name for found in by_method for name in found} - {*common}):
        say(f"left out, because not every method has drawn it: {', '.join(missing)}")
    return [tuple(found[name] for found in by_method) for name in common]


def match_prompts(methods: Sequence[SubjectFiles]) -> list[tuple[str | None, tuple[Drawn, ...]]]:
    """Return a row for each prompt, with what each method has drawn for it.

    Rows are matched by the text of their prompts. Two methods that name the subject by different words ("a sks dog", "a
    <dog3>") have no text in common; then the order of the prompts says which belong together.
    """
    drawn = [_by_prompt(subject) for subject in methods]
    texts = list(dict.fromkeys(prompt for own in drawn for prompt in own))
    in_common = {*drawn[0]}.intersection(*drawn[1:])
    if in_common or len({len(own) for own in drawn}) > 1:
        return [(text, tuple((text, own.get(text, ())) for own in drawn)) for text in texts]
    say(f"{methods[0].name}: no prompt is the same in all folders; they are matched by their order")
    return [(cells[0][0], tuple(cells)) for cells in zip(*(own.items() for own in drawn), strict=True)]


def _by_prompt(subject: SubjectFiles) -> dict[str | None, tuple[Path, ...]]:
    found: dict[str | None, tuple[Path, ...]] = {}
    for prompt, files in subject.prompts:
        found[prompt] = found.get(prompt, ()) + files
    return found
