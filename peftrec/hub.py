"""The Hub: publishing an adapter so that what arrives is what was measured, and taking one without trusting it.

    push("runs/films", "me/films")              # or "file:/site/adapters/films"
    pull("me/films", revision="v1")
    info("me/films")
    list_adapters("me")

`push` goes through five doors: the folder holds nothing but an adapter (`contents.check_folder`), its card is valid, a
fresh process gets the recorded scores from it, everything goes up in one commit, and what is read back has the same
hashes. The revision that others see is the old one or the new one at every moment.
"""

from peftrec.hub_checks import check_card, check_reload
from peftrec.hub_info import Info, Listed, info, list_adapters
from peftrec.hub_pull import pull
from peftrec.hub_push import Difference, Published, push

__all__ = [
    "Difference",
    "Info",
    "Listed",
    "Published",
    "check_card",
    "check_reload",
    "info",
    "list_adapters",
    "pull",
    "push",
]
