"""Payments: the service that not everybody should be able to call."""

import itertools

from service import serve

RECEIPTS = itertools.count(1)


def charge(call):
    return {"receipt": f"receipt-{next(RECEIPTS)}-{call.query.get('amount', '0')}"}


serve("payments", {"/charge": charge})
