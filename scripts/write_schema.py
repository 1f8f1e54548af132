"""Write docs/schema.md from the schema: `python scripts/write_schema.py`."""

from pathlib import Path

from saeql.store.schema_text import schema_markdown

if __name__ == "__main__":
    Path(__file__).parent.parent.joinpath("docs", "schema.md").write_text(schema_markdown(), encoding="utf-8")
