"""How often the class noun of a subject is found from its photos, and how often the answer is wrong.

    python benchmarks/quality/class_nouns.py PHOTOS PROMPTS_AND_CLASSES

PHOTOS has a folder of photos for each subject, as `dataset/` of github.com/google/dreambooth; PROMPTS_AND_CLASSES is a
JSON file whose `subjects` name the class of each. Prints a line for each subject.
"""

import argparse
import json
from pathlib import Path

from lowmem_db.evaluation.class_noun import find_class_noun


def main() -> None:
    """Look at every subject."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("classes", type=Path)
    arguments = parser.parse_args()
    classes = json.loads(arguments.classes.read_text())["subjects"]
    for folder in sorted(folder for folder in arguments.photos.iterdir() if folder.name in classes):
        found = find_class_noun(folder)
        guesses = ", ".join(f"{noun} {share:.2f}" for noun, share in found.guesses)
        print(f"{folder.name:20} {classes[folder.name]:15} {found.noun or 'not sure':15} ({guesses})")


if __name__ == "__main__":
    main()
