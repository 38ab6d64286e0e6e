"""The shop's door: shows the catalog, and buys (catalog, then cart, which asks payments)."""

from service import serve


def index(call):
    return {"items": call.ask("catalog", "/items")["items"]}


def buy(call):
    item = call.query.get("item", "tea")
    priced = call.ask("catalog", f"/price?item={item}")
    order = call.ask("cart", f"/checkout?item={item}&price={priced['price']}")
    return {"item": item, "price": priced["price"], "via": [priced, order]}


serve("frontend", {"/": index, "/buy": buy})
