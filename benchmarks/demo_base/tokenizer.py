"""Builds a small CLIP tokenizer: the most frequent byte-pair merges of CLIP's own, and nothing else."""

import argparse
import gzip
import json
import tempfile
from pathlib import Path

from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"


def byte_symbols() -> list[str]:
    """Returns the printable symbol of each of the 256 bytes, in the order of CLIP's vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(hidden))]


def build_tokenizer(merges_file: Path, entries: int = 8192, length: int = 48) -> CLIPTokenizer:
    """Returns a tokenizer whose merges are a prefix of CLIP's, which are ordered by frequency.

    Args:
        merges_file: CLIP's `bpe_simple_vocab_16e6.txt.gz`.
        entries: size of the vocabulary, the two special tokens included; they are the last two.
        length: number of positions of the text encoder.
    """
    symbols = byte_symbols()
    lines = gzip.decompress(merges_file.read_bytes()).decode("utf-8").split("\n")
    merges = lines[1 : 1 + entries - 2 * len(symbols) - 2]
    words = symbols + [symbol + "</w>" for symbol in symbols] + [line.replace(" ", "") for line in merges]
    vocabulary = {word: index for index, word in enumerate([*words, START, END])}
    with tempfile.TemporaryDirectory() as folder:
        vocab_file, merges_out = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocab_file.write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
        merges_out.write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
        config = {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": length,
            "bos_token": START,
            "eos_token": END,
            "unk_token": END,
            "pad_token": END,
        }
        Path(folder, "tokenizer_config.json").write_text(json.dumps(config))
        return CLIPTokenizer.from_pretrained(folder)


def write_vocabulary(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Writes vocab.json and merges.txt, the files that older loaders read, beside tokenizer.json."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    entries = sorted((tokenizer.get_vocab() | model["vocab"]).items(), key=lambda entry: entry[1])
    vocabulary = json.dumps(dict(entries), ensure_ascii=False)
    (folder / "vocab.json").write_text(vocabulary + "\n", encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n", encoding="utf-8")


def main() -> None:
    """Builds and saves the tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--merges", type=Path, required=True, help="CLIP's bpe_simple_vocab_16e6.txt.gz")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    tokenizer = build_tokenizer(args.merges)
    tokenizer.save_pretrained(args.out)
    write_vocabulary(tokenizer, args.out)


if __name__ == "__main__":
    main()
