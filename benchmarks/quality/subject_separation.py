"""How well an encoder tells subjects apart, on real photos: the ground under every figure of subject fidelity.

    python benchmarks/quality/subject_separation.py PHOTOS [--encoder en0] [--subjects dog dog2 dog3]

PHOTOS has a folder of photos for each subject, such as `dataset/` of github.com/google/dreambooth. Printed as one JSON
line: the probability that two photos of one subject are more alike than two of different subjects (AUC), how often the
nearest photo is of the same subject, and the mean cosines.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from lowmem_db.data.photos import read_photo
from lowmem_db.evaluation.encoders import find_encoders, load_encoder
from lowmem_db.evaluation.folders import scan_pictures
from lowmem_db.evaluation.metrics import cosine_similarities


def separation(cosines: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return AUC, accuracy of the nearest photo, and the mean cosine of same and of different subjects."""
    same = labels[:, None] == labels[None, :]
    above = np.triu_indices(len(labels), 1)
    values, is_same = cosines[above], same[above]
    ranks = values.argsort().argsort()
    num_same, num_other = int(is_same.sum()), int((~is_same).sum())
    others = cosines.copy()
    np.fill_diagonal(others, -np.inf)
    return {
        "auc": float((ranks[is_same].sum() - num_same * (num_same - 1) / 2) / (num_same * num_other)),
        "nearest_is_same": float((labels[others.argmax(axis=1)] == labels).mean()),
        "cosine_same": float(values[is_same].mean()),
        "cosine_different": float(values[~is_same].mean()),
        "pairs_same": num_same,
        "pairs_different": num_other,
    }


def main() -> None:
    """Measure one encoder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--encoder", default="en0")
    parser.add_argument("--subjects", nargs="+", help="only these folders, such as those of one class")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    arguments = parser.parse_args()
    files = find_encoders([arguments.encoder])[0]
    encoder = load_encoder(files, arguments.device)
    folders = sorted(folder for folder in arguments.photos.iterdir() if folder.is_dir())
    if arguments.subjects is not None:
        folders = [arguments.photos / name for name in arguments.subjects]
    photos = [(folder.name, file) for folder in folders for file in scan_pictures(folder, "PHOTOS")]
    embedded = encoder.embed_images([read_photo(file) for _, file in photos])
    labels = np.array([subject for subject, _ in photos])
    found = separation(cosine_similarities(embedded, embedded).numpy(), labels)
    print(json.dumps({"encoder": files.name, "photos": len(photos), "subjects": len(folders)} | found))


if __name__ == "__main__":
    main()
