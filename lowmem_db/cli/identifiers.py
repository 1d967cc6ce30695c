"""``lowmem-db identifiers``."""

from typing import Annotated

import typer


def identifiers(
    model: Annotated[
        str, typer.Argument(help="The model whose vocabulary is used: a folder, a hub id, or demo.")
    ] = "demo",
    count: Annotated[int, typer.Option(min=1, help="How many to print.")] = 10,
    num_tokens: Annotated[
        int | None, typer.Option(min=1, max=3, help="Tokens per identifier. Default: 1 to 3.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
) -> None:
    """Print rare identifiers for a subject, as in section 3.2 of the paper: words that mean nothing to the model yet.

    Each line holds an identifier and its token ids. Use one in the prompt: "a IDENTIFIER dog".
    """
    from lowmem_db.data.identifiers import rare_identifiers
    from lowmem_db.models.finding import find_model

    found = find_model(model)
    tokenizer = found.load(found.family.names_of("tokenizer")[0])
    for identifier in rare_identifiers(tokenizer, count=count, seed=seed, num_tokens=num_tokens):
        typer.echo(f"{identifier.text}\t{' '.join(map(str, identifier.token_ids))}")
