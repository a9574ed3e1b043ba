"""The table of objectives in README; `python -m tokenrl.docs README.md` writes it there."""

import re
import sys
from pathlib import Path

from .describe import objectives_table

if __name__ == "__main__":
    path = Path(sys.argv[1])
    between = f"<!-- objectives -->\n{objectives_table()}\n<!-- /objectives -->"
    path.write_text(
        re.sub(r"<!-- objectives -->\n.*?<!-- /objectives -->", lambda _: between, path.read_text(), flags=re.S)
    )
