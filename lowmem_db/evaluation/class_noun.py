"""The class noun of a subject from its photos (section 3.2 of arXiv:2208.12242: "obtained using a classifier").

The classes of ImageNet are gathered to nouns as people use them in a prompt. What ImageNet does not know (a toy, a
cartoon, a person) is not guessed: the answer is then a list of what it could be.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from lowmem_db.data.photos import read_photo
from lowmem_db.evaluation.encoders import ImageNetClassifier, find_encoders
from lowmem_db.evaluation.folders import scan_pictures

SURE = 0.5
"""Share of probability from which a noun is an answer: it is then likelier than everything else together."""
NUM_GUESSES = 3
_Classes = int | range

NOUNS: dict[str, tuple[_Classes, ...]] = {
    # animals
    "dog": (range(151, 269),),
    "cat": (range(281, 286),),
    "bird": (range(7, 25), range(80, 97), range(99, 101), range(127, 145), 146),
    "duck": (97, 98),
    "penguin": (145,),
    "fish": (0, 1, range(389, 398)),
    "shark": (range(2, 5),),
    "turtle": (range(33, 38),),
    "lizard": (range(38, 49),),
    "snake": (range(52, 69),),
    "frog": (range(30, 33),),
    "spider": (range(72, 78),),
    "butterfly": (range(321, 327),),
    "snail": (113,),
    "crab": (range(118, 122),),
    "rabbit": (range(330, 333),),
    "hamster": (333,),
    "guinea pig": (338,),
    "squirrel": (335,),
    "horse": (339,),
    "zebra": (340,),
    "pig": (341, 342),
    "cow": (345,),
    "sheep": (348, 349),
    "goat": (350,),
    "camel": (354,),
    "llama": (355,),
    "wolf": (range(269, 272),),
    "fox": (range(277, 281),),
    "lion": (291,),
    "tiger": (292,),
    "leopard": (range(288, 291), 293),
    "bear": (range(294, 298),),
    "monkey": (range(370, 383),),
    "ape": (range(365, 370),),
    "elephant": (101, 385, 386),
    "panda": (388,),
    "koala": (105,),
    # what people carry and wear
    "stuffed animal": (850,),
    "backpack": (414,),
    "handbag": (748,),
    "sunglasses": (836, 837),
    "watch": (531,),
    "umbrella": (879,),
    "hat": (439, 452, 515, 808),
    "helmet": (518, 560),
    "mask": (643,),
    "sneaker": (770,),
    "boot": (514,),
    "sandal": (774,),
    "shoe": (502, 630),
    "sweater": (474, 841),
    "shirt": (610,),
    "jeans": (608,),
    "dress": (578,),
    "coat": (568, 869),
    "tie": (457, 906),
    "sock": (806,),
    "necklace": (679,),
    "lipstick": (629,),
    "perfume": (711,),
    # at home
    "cup": (968,),
    "mug": (504,),
    "teapot": (849,),
    "bowl": (659, 809),
    "plate": (923,),
    "vase": (883,),
    "bottle": (440, 720, 737, 898, 907),
    "candle": (470,),
    "clock": (409, 530, 892),
    "lamp": (619, 846),
    "chair": (423, 559, 765),
    "sofa": (831,),
    "table": (532,),
    "desk": (526,),
    "bed": (564,),
    "pillow": (721,),
    "piggy bank": (719,),
    "camera": (732, 759),
    "phone": (487, 528),
    "laptop": (620,),
    "keyboard": (508,),
    "television": (851,),
    "toaster": (859,),
    "guitar": (402, 546),
    "piano": (579, 881),
    "violin": (889,),
    "drum": (541,),
    "ball": (429, 430, 522, 574, 722, 768, 805, 852, 890),
    "balloon": (417,),
    "pen": (418, 563),
    "comic book": (917,),
    # outside
    "car": (436, 468, 511, 609, 627, 656, 661, 751, 817),
    "truck": (555, 569, 675, 717, 864, 867),
    "bus": (654, 779, 874),
    "train": (466, 547, 705, 820),
    "bicycle": (444, 671),
    "motorcycle": (665, 670),
    "boat": (472, 484, 554, 576, 625, 780, 814, 871, 914),
    "ship": (510, 628),
    "airplane": (404, 895),
    "church": (497,),
    "castle": (483,),
    "flower": (985, 986),
    "mushroom": (947, range(991, 998)),
    "apple": (948,),
    "strawberry": (949,),
    "orange": (950,),
    "lemon": (951,),
    "pineapple": (953,),
    "banana": (954,),
    "pumpkin": (607,),
    "pizza": (963,),
    "hamburger": (933,),
    "ice cream": (928,),
}
"""Classes of ImageNet (ILSVRC 2012, in their usual order) by noun; no class belongs to two."""


@dataclass(frozen=True, kw_only=True)
class ClassNoun:
    """What the photos of a subject show.

    Attributes:
        noun: The class noun, or None if the classifier is not sure.
        guesses: The likeliest nouns with their shares of probability, the likeliest first.
    """

    noun: str | None
    guesses: tuple[tuple[str, float], ...]


def find_class_noun(photos: Path) -> ClassNoun:
    """Return what the photos of a folder show, as EfficientNet-Lite0 sees them, on the CPU.

    Raises:
        DataError: The folder does not exist, or has no picture or damaged ones.
        DependencyError: The package with the classifier is not installed.
        ModelError: Its weights are damaged.
    """
    pictures = [read_photo(file) for file in scan_pictures(photos, "PHOTOS")]
    classifier = ImageNetClassifier(find_encoders(["en0"])[0], torch.device("cpu"))
    return class_noun(classifier.classify(pictures))


def class_noun(probabilities: Float[Tensor, "n 1000"]) -> ClassNoun:
    """Gather what a classifier says of each photo to one noun.

    Args:
        probabilities: A row of ImageNet's class probabilities for each photo of the subject.
    """
    mean = probabilities.double().mean(dim=0)
    shares = {noun: float(mean[_indices(classes)].sum()) for noun, classes in NOUNS.items()}
    ranked = sorted(shares.items(), key=lambda guess: -guess[1])
    best, share = ranked[0]
    return ClassNoun(noun=best if share >= SURE else None, guesses=tuple(ranked[:NUM_GUESSES]))


def _indices(classes: Iterable[_Classes]) -> Sequence[int]:
    return [index for each in classes for index in ([each] if isinstance(each, int) else each)]
