"""What is trained on: a file per task, its prompts in prompts/. Plain Python; torch only where a .pth is read.

`data` and `rewards` are everybody's names. So each package here imports the next lower one from beside itself, whatever
stands before it on the path; folders of these names elsewhere on the path are searched after ours."""
import sys
from pathlib import Path
from pkgutil import extend_path

home = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(home))
import rewards  # noqa: E402

sys.path.pop(0)
if home not in Path(rewards.__file__ or "/").resolve().parents:
    raise ImportError(f"{rewards} hides the package rewards in {home}: it was imported before, and needs another name")
__path__ = extend_path(__path__, __name__)
