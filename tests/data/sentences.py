"""A corpus of four sentences, to make vocabularies from."""

SOURCES = [
    "Zwei junge weiße Männer sind im Freien .",
    "Ein kleines Mädchen klettert in ein Spielhaus .",
    "Ein Mann in einem blauen Hemd steht auf einer Leiter .",
    "Zwei Männer stehen am Herd und kochen Essen .",
]
TARGETS = [
    "Two young white men are outside .",
    "A little girl climbing into a playhouse .",
    "A man in a blue shirt is standing on a ladder .",
    "Two men are at the stove preparing food .",
]
CORPUS = [
    {"source": source, "targets": [target, "another reference"], "line": line}
    for line, (source, target) in enumerate(zip(SOURCES, TARGETS, strict=True), 1)
] * 5
TEXT_KINDS = ("unigram", "bpe", "char", "word")


def corpus_of(*pairs):
    return [{"source": source, "targets": [target], "line": 1} for source, target in pairs]
