"""The live comparison: run by `bash launch/test.sh --parity`, where torch is."""

import pathlib
import sys
import warnings

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "hub")]
warnings.filterwarnings("ignore", module="torch|transformers")
