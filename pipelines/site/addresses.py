"""Where things are in a site: the server's addresses as those of files, relative, so that any folder will do."""

from collections.abc import Sequence
from urllib.parse import urlencode


class Addresses:
    """Makes what stands in an href, from a path of the server and its fields; `names` are the dictionaries in order.

    A dictionary is part of a page's name, the first one's left out; two are in that of a comparison.
    """

    def __init__(self, names: Sequence[str]):
        self.names = list(names)

    def __call__(self, path: str, **fields: object) -> str:
        kept = {name: value for name, value in fields.items() if value not in (None, "", [])}
        if path == "/compare":
            one, other = (self._number(kept.get(field), n) for n, field in enumerate(("one", "other")))
            if one == other:  # nothing is compared with itself
                other = int(one == 0)
            return f"compare.{one}.{other}.html"
        page = "index" if path == "/" else "features"
        if path.startswith("/features/"):
            page, kept = "feature", {"id": path.removeprefix("/features/"), **kept}
        number = self._number(kept.pop("dictionary", None), 0)
        query = f"?{urlencode(kept, errors='replace')}" if kept else ""
        return f"{page}{f'.{number}' if number else ''}.html{query}"

    def _number(self, name: object, default: int) -> int:
        return min(default, len(self.names) - 1) if name is None else self.names.index(str(name))
