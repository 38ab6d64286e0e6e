"""What the shop sells."""

from service import serve

PRICES = {"tea": 7, "cups": 12, "kettle": 40}


def items(_call):
    return {"items": sorted(PRICES)}


def price(call):
    return {"price": PRICES.get(call.query.get("item", ""), 0)}


serve("catalog", {"/items": items, "/price": price})
