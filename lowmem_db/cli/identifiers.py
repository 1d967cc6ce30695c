"""``lowmem-db identifiers``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowmem_db.cli.modes import refuse_others

if TYPE_CHECKING:
    from lowmem_db.evaluation.class_noun import ClassNoun


def identifiers(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help="The model whose vocabulary is used: a folder, a hub id, or demo.")
    ] = "demo",
    count: Annotated[int, typer.Option(min=1, help="How many to print.")] = 10,
    num_tokens: Annotated[
        int | None, typer.Option(min=1, max=3, help="Tokens per identifier. Default: 1 to 3.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    class_noun: Annotated[
        Path | None,
        typer.Option(metavar="PHOTOS", help="Look at these photos instead, and print the class noun."),
    ] = None,
) -> None:
    """Print rare identifiers for a subject, as in section 3.2 of the paper: words that mean nothing to the model yet.

    Each line holds an identifier and its token ids. Use one in the prompt: "a IDENTIFIER dog". The word after it is the
    class noun: with [bold]--class-noun PHOTOS[/bold] a classifier names it, where it is sure.
    """
    if class_noun is not None:
        refuse_others(context, "--class-noun", {"class_noun"})
        typer.echo(_noun(class_noun))
        return

    from lowmem_db.run.inputs import check_place

    check_place("MODEL", model)

    from lowmem_db.data.identifiers import rare_identifiers
    from lowmem_db.models.finding import find_model

    found = find_model(model)
    tokenizer = found.load(found.family.names_of("tokenizer")[0])
    for identifier in rare_identifiers(tokenizer, count=count, seed=seed, num_tokens=num_tokens):
        typer.echo(f"{identifier.text}\t{' '.join(map(str, identifier.token_ids))}")


def _noun(photos: Path) -> str:
    """Return the class noun that the classifier or, where it is not sure, the user names."""
    import sys

    from lowmem_db import api
    from lowmem_db.console import say
    from lowmem_db.errors import DataError

    found = api.class_noun(photos)
    if found.noun is not None:
        say(f'{_in_words(found)}. Use it as subject.class_prompt="a {found.noun}", after the identifier in the prompt')
        return found.noun
    if not sys.stdin.isatty():
        raise DataError(
            f"--class-noun: {photos}: the classifier is not sure ({_in_words(found)}), and nobody can be asked here; "
            "name it yourself, by the word that people would use: dog, teapot, toy"
        )
    say(f"not sure what this is: {_in_words(found)}")
    return str(typer.prompt("Which word would people use?", err=True)).strip()


def _in_words(found: "ClassNoun") -> str:
    return ", ".join(f"{noun} {share:.0%}" for noun, share in found.guesses)
