"""Carries out one merge in mergekit's environment, in a process of its own, as mergekit keeps open what it reads.

A script that imports nothing of this program; it prints mergekit's version, or why there is no merge, as JSON.
"""

import contextlib
import json
import sys
from importlib.metadata import version

if __name__ == "__main__":
    recipe, options = json.loads(sys.argv[1])
    options |= {"device": "cpu", "trust_remote_code": False, "write_model_card": False, "quiet": True}
    try:
        with contextlib.redirect_stdout(sys.stderr):
            from mergekit.config import MergeConfiguration
            from mergekit.merge import run_merge
            from mergekit.options import MergeOptions

            run_merge(MergeConfiguration.model_validate(recipe), "model", options=MergeOptions(**options))
        said = {"mergekit": version("mergekit")}
    except ModuleNotFoundError as error:
        said = {"lacks": str(error.name)}
    except Exception as error:
        said = {"error": " ".join(f"{type(error).__name__}: {error}".split())}
    print(json.dumps(said))
