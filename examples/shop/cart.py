"""Carts: takes an order and has it paid."""

from service import serve


def checkout(call):
    paid = call.ask("payments", f"/charge?amount={call.query.get('price', '0')}")
    return {"paid": paid["receipt"], "via": [paid]}


serve("cart", {"/checkout": checkout})
