"""Words that more than one skill fills its templates with."""

HOSTS = (
    "https://api.example.com",
    "https://api.example.com/v2",
    "https://data.example.com/v1",
    "https://example.com/api",
    "https://shop.example.com",
)

# All have a regular plural and take "a", so that templates can write ${noun}s and "a $noun".
NOUNS = (
    "book",
    "booking",
    "comment",
    "course",
    "device",
    "document",
    "member",
    "message",
    "payment",
    "photo",
    "playlist",
    "product",
    "project",
    "recipe",
    "report",
    "review",
    "room",
    "shipment",
    "station",
    "task",
    "team",
    "ticket",
    "user",
    "vehicle",
)

READ_VERBS = ("fetch", "get", "load", "read")
TEXT_FIELDS = ("name", "title", "label", "status", "summary", "owner")
OTHER_FIELDS = ("price", "email", "city", "category", "language", "quantity")
TIMEOUTS_S = ("2", "3", "5", "8", "15", "20", "30")
CURRENCIES = ("usd", "eur", "gbp", "chf", "cad", "aud", "sek", "nok", "dkk", "pln")
METADATA_KEYS = (
    "account_id",
    "campaign",
    "cart_id",
    "company",
    "locale",
    "order_id",
    "referrer",
    "region",
    "source",
    "team_id",
    "user_id",
)
PAGE_SIZES = ("5", "10", "20", "25", "50", "100")
