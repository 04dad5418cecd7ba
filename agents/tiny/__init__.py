"""The tiny language models that turnwise ships, each a transformers checkpoint of 0.8 M parameters.

`LONG` and `SHORT` play Long⊗Short, `ROUTER` plays Thinkless, all of them on the arithmetic environment. `NOVICE` can
think and answer there, but has never had a partner: a base model for the cold start. They load by `from_pretrained`, as
any checkpoint does. `python -m turnwise.rl.tiny_models FOLDER` trains them anew.
"""

from pathlib import Path

LONG, SHORT, ROUTER, NOVICE = (Path(__file__).parent / name for name in ("long", "short", "router", "novice"))
