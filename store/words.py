"""Words of a text and their stems, the same for the index and for the query."""

import snowballstemmer

#: DuckDB expression: the lower-case words of `text` as VARCHAR[]; a word is a run of letters and digits.
WORDS_OF = r"regexp_extract_all(lower(text), '[\p{L}\p{N}]+')"

_STEMMER = snowballstemmer.stemmer("english")


def stem(words: list[str]) -> list[str]:
    """The term every word is indexed under, one a word."""
    return _STEMMER.stemWords(words)
