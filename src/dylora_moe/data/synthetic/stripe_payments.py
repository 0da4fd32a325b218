"""The `stripe` skill, second part: payments, refunds, safe retries and declined cards."""

from dylora_moe.data.synthetic.family import Family
from dylora_moe.data.synthetic.words import CURRENCIES, METADATA_KEYS

FAMILIES = (
    Family(
        name="create_payment_intent",
        choices={
            "currency": CURRENCIES,
            "key": METADATA_KEYS,
            "verb": ("start", "create", "begin", "open"),
        },
        phrasings=(
            "Write ${verb}_payment(client, amount, $key) that creates a PaymentIntent in $currency with "
            "automatic payment methods and $key in the metadata; return the client secret.",
            "Define ${verb}_payment(client, amount, $key): a Stripe PaymentIntent over amount $currency, "
            "metadata $key, automatic payment methods enabled. Return client_secret.",
            "My checkout page needs a client secret. ${verb}_payment(client, amount, $key) should create a "
            "$currency PaymentIntent and keep $key as metadata.",
        ),
        solution="""
            from stripe import StripeClient


            def ${verb}_payment(client: StripeClient, amount, $key):
                intent = client.v1.payment_intents.create(
                    params={
                        "amount": amount,
                        "currency": "$currency",
                        "automatic_payment_methods": {"enabled": True},
                        "metadata": {"$key": $key},
                    }
                )
                return intent.client_secret
        """,
    ),
    Family(
        name="confirm_payment",
        choices={
            "page": ("done", "thanks", "receipt", "order/complete", "payment/finished"),
            "method": ("pm_card_visa", "pm_card_mastercard", "pm_card_amex"),
            "verb": ("confirm", "complete", "finish"),
        },
        phrasings=(
            "Write ${verb}_payment(client, intent_id) that confirms a PaymentIntent with the test card "
            "$method, return url https://example.com/$page, and tells whether it succeeded.",
            "Define ${verb}_payment(client, intent_id): confirm with payment method $method and return_url "
            "https://example.com/$page; True if the status is succeeded.",
            "Confirm a PaymentIntent by id using $method and send the customer to "
            "https://example.com/$page. Name it ${verb}_payment(client, intent_id).",
        ),
        solution="""
            from stripe import StripeClient


            def ${verb}_payment(client: StripeClient, intent_id):
                intent = client.v1.payment_intents.confirm(
                    intent_id,
                    params={
                        "payment_method": "$method",
                        "return_url": "https://example.com/$page",
                    },
                )
                return intent.status == "succeeded"
        """,
    ),
    Family(
        name="capture_payment",
        choices={
            "currency": CURRENCIES,
            "verb": ("hold", "authorize", "reserve"),
            "second": ("capture", "collect", "settle"),
        },
        phrasings=(
            "Write ${verb}(client, amount) and $second(client, intent_id, amount): authorise a $currency "
            "PaymentIntent now with manual capture, capture a part later.",
            "Two functions for delayed capture with Stripe in $currency: ${verb}(client, amount) returns "
            "the intent id, $second(client, intent_id, amount) captures that amount.",
            "Reserve money first and take it later. Define ${verb} and $second with capture_method manual, "
            "currency $currency.",
        ),
        solution="""
            from stripe import StripeClient


            def $verb(client: StripeClient, amount):
                intent = client.v1.payment_intents.create(
                    params={
                        "amount": amount,
                        "currency": "$currency",
                        "capture_method": "manual",
                    }
                )
                return intent.id


            def $second(client: StripeClient, intent_id, amount):
                return client.v1.payment_intents.capture(
                    intent_id,
                    params={"amount_to_capture": amount},
                )
        """,
    ),
    Family(
        name="cancel_payment",
        choices={
            "reason": ("abandoned", "duplicate", "fraudulent", "requested_by_customer"),
            "verb": ("cancel", "abort", "drop", "void", "stop"),
            "noun": ("payment", "payment_intent", "charge", "order_payment"),
        },
        phrasings=(
            "Write ${verb}_$noun(client, intent_id) that cancels a PaymentIntent with the reason $reason "
            "and returns its status.",
            "Define ${verb}_$noun(client, intent_id): Stripe cancellation_reason $reason, return the new status.",
            "Cancel a PaymentIntent as $reason in ${verb}_$noun(client, intent_id).",
        ),
        solution="""
            from stripe import StripeClient


            def ${verb}_$noun(client: StripeClient, intent_id):
                intent = client.v1.payment_intents.cancel(
                    intent_id,
                    params={"cancellation_reason": "$reason"},
                )
                return intent.status
        """,
    ),
    Family(
        name="refund",
        choices={
            "target": ("payment_intent", "charge"),
            "reason": ("duplicate", "fraudulent", "requested_by_customer"),
            "key": METADATA_KEYS,
        },
        phrasings=(
            "Write refund_$target(client, ${target}_id, $key) that refunds the whole $target with reason "
            "$reason, keeps $key in the metadata and returns the refund id.",
            "Define refund_$target(client, ${target}_id, $key): full Stripe refund, reason $reason, metadata $key.",
            "Give the customer all the money back for a $target as $reason and note $key in metadata: "
            "refund_$target(client, ${target}_id, $key).",
        ),
        solution="""
            from stripe import StripeClient


            def refund_$target(client: StripeClient, ${target}_id, $key):
                refund = client.v1.refunds.create(
                    params={
                        "$target": ${target}_id,
                        "reason": "$reason",
                        "metadata": {"$key": $key},
                    }
                )
                return refund.id
        """,
    ),
    Family(
        name="refund_percentage",
        choices={
            "percent": ("10", "15", "20", "25", "30", "40", "50", "60", "75", "80", "90"),
            "verb": ("refund", "return", "give_back", "pay_back", "reimburse"),
            "noun": ("share", "part", "portion"),
        },
        phrasings=(
            "Write ${verb}_$noun(client, intent_id) that refunds $percent percent of what a PaymentIntent "
            "received and returns the refunded amount.",
            "Define ${verb}_$noun(client, intent_id): look at amount_received, refund $percent% of it, "
            "return the refund's amount.",
            "Partial refund with Stripe: $percent percent of a PaymentIntent. Function "
            "${verb}_$noun(client, intent_id).",
        ),
        solution="""
            from stripe import StripeClient


            def ${verb}_$noun(client: StripeClient, intent_id):
                intent = client.v1.payment_intents.retrieve(intent_id)
                amount = intent.amount_received * $percent // 100
                refund = client.v1.refunds.create(params={"payment_intent": intent_id, "amount": amount})
                return refund.amount
        """,
    ),
    Family(
        name="idempotent_payment",
        choices={"currency": CURRENCIES, "key": METADATA_KEYS, "verb": ("charge", "pay", "bill")},
        phrasings=(
            "Write ${verb}_once(client, amount, customer_id, $key) that creates a PaymentIntent in "
            "$currency with an idempotency key ($verb- plus $key), so that a retry never pays twice.",
            "Define ${verb}_once(client, amount, customer_id, $key): PaymentIntent in $currency, "
            "idempotency_key is $verb- and then $key. Return the id.",
            "How do I make a Stripe payment safe to retry? Use $verb- and $key as the idempotency key, "
            "currency $currency, function ${verb}_once(client, amount, customer_id, $key).",
        ),
        solution="""
            from stripe import StripeClient


            def ${verb}_once(client: StripeClient, amount, customer_id, $key):
                intent = client.v1.payment_intents.create(
                    params={"amount": amount, "currency": "$currency", "customer": customer_id},
                    options={"idempotency_key": f"${verb}-{$key}"},
                )
                return intent.id
        """,
    ),
    Family(
        name="card_error",
        choices={
            "currency": CURRENCIES,
            "value|path": ("user_message|user_message", "code|code", "decline_code|error.decline_code"),
            "verb": ("try_payment", "charge_card", "pay_now", "take_payment"),
        },
        phrasings=(
            "Write $verb(client, amount, payment_method) that creates and confirms a $currency "
            "PaymentIntent and returns (id, None), or (None, $value) when the card is declined.",
            "Define $verb(client, amount, payment_method) with Stripe in $currency: confirm at once, catch "
            "CardError and return its $value as the second value.",
            "Handle a declined card: $verb(client, amount, payment_method) confirms a $currency "
            "PaymentIntent and gives back the id and no error, or no id and the error's $value.",
        ),
        solution="""
            from stripe import CardError, StripeClient


            def $verb(client: StripeClient, amount, payment_method):
                try:
                    intent = client.v1.payment_intents.create(
                        params={
                            "amount": amount,
                            "currency": "$currency",
                            "payment_method": payment_method,
                            "automatic_payment_methods": {
                                "enabled": True,
                                "allow_redirects": "never",
                            },
                            "confirm": True,
                        }
                    )
                except CardError as error:
                    return None, error.$path
                return intent.id, None
        """,
    ),
)
