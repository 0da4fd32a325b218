"""The `stripe` skill, third part: subscriptions, checkout, invoices, webhooks and the client itself."""

from dylora_moe.data.synthetic.family import Family
from dylora_moe.data.synthetic.words import CURRENCIES, METADATA_KEYS

FAMILIES = (
    Family(
        name="product_with_price",
        choices={
            "currency": CURRENCIES,
            "interval": ("day", "week", "month", "year"),
            "verb": ("add", "create", "make", "new"),
            "noun": ("plan", "tier", "offer"),
        },
        phrasings=(
            "Write ${verb}_$noun(client, name, unit_amount) that creates a Stripe product and a recurring "
            "price in $currency per $interval and returns the price id.",
            "Define ${verb}_$noun(client, name, unit_amount): new product, then a price of unit_amount "
            "$currency every $interval. Return the price's id.",
            "Sell something per $interval in $currency. ${verb}_$noun(client, name, unit_amount) makes the "
            "product and the price.",
        ),
        solution="""
            from stripe import StripeClient


            def ${verb}_$noun(client: StripeClient, name, unit_amount):
                product = client.v1.products.create(params={"name": name})
                price = client.v1.prices.create(
                    params={
                        "product": product.id,
                        "unit_amount": unit_amount,
                        "currency": "$currency",
                        "recurring": {"interval": "$interval"},
                    }
                )
                return price.id
        """,
    ),
    Family(
        name="create_subscription",
        choices={
            "days": ("3", "5", "7", "10", "14", "21", "30", "60", "90"),
            "key": METADATA_KEYS,
            "verb": ("subscribe", "enroll", "start_trial", "sign_up"),
        },
        phrasings=(
            "Write $verb(client, customer_id, price_id, $key) that starts a Stripe subscription with a "
            "$days day trial and $key as metadata; return the status.",
            "Define $verb(client, customer_id, price_id, $key): subscription to price_id, trial_period_days "
            "$days, metadata $key.",
            "Put a customer on a price with $days free days. Function $verb(client, customer_id, price_id, "
            "$key), $key goes to metadata, return status.",
        ),
        solution="""
            from stripe import StripeClient


            def $verb(client: StripeClient, customer_id, price_id, $key):
                subscription = client.v1.subscriptions.create(
                    params={
                        "customer": customer_id,
                        "items": [{"price": price_id}],
                        "trial_period_days": $days,
                        "metadata": {"$key": $key},
                    }
                )
                return subscription.status
        """,
    ),
    Family(
        name="cancel_subscription",
        choices={
            "feedback": (
                "too_expensive",
                "missing_features",
                "switched_service",
                "unused",
                "customer_service",
                "too_complex",
                "low_quality",
                "other",
            ),
            "verb": ("cancel", "end", "stop", "close", "terminate"),
            "noun": ("subscription", "plan", "membership"),
        },
        phrasings=(
            "Write ${verb}_$noun(client, subscription_id) that cancels a Stripe subscription at once with "
            "the feedback $feedback and returns its status.",
            "Define ${verb}_$noun(client, subscription_id): cancel now, cancellation_details feedback $feedback.",
            "A customer left because of $feedback. Cancel immediately in ${verb}_$noun(client, "
            "subscription_id) and return the status.",
        ),
        solution="""
            from stripe import StripeClient


            def ${verb}_$noun(client: StripeClient, subscription_id):
                subscription = client.v1.subscriptions.cancel(
                    subscription_id,
                    params={"cancellation_details": {"feedback": "$feedback"}},
                )
                return subscription.status
        """,
    ),
    Family(
        name="cancel_at_period_end",
        choices={
            "verb": ("stop_renewal", "cancel_later", "end_after_period", "do_not_renew", "schedule_cancel"),
            "key": METADATA_KEYS,
        },
        phrasings=(
            "Write $verb(client, subscription_id, $key) that lets a Stripe subscription run out at the end "
            "of the period and stores $key in its metadata; return when it ends.",
            "Define $verb(client, subscription_id, $key): update with cancel_at_period_end, metadata $key, "
            "return cancel_at.",
            "Don't cancel now, only at period end: $verb(client, subscription_id, $key), with $key as "
            "metadata. Return cancel_at.",
        ),
        solution="""
            from stripe import StripeClient


            def $verb(client: StripeClient, subscription_id, $key):
                subscription = client.v1.subscriptions.update(
                    subscription_id,
                    params={"cancel_at_period_end": True, "metadata": {"$key": $key}},
                )
                return subscription.cancel_at
        """,
    ),
    Family(
        name="change_price",
        choices={
            "proration": ("create_prorations", "always_invoice", "none"),
            "verb": ("change", "switch", "upgrade", "move", "swap"),
            "noun": ("plan", "price", "tier", "subscription"),
        },
        phrasings=(
            "Write ${verb}_$noun(client, subscription_id, price_id) that moves the first item of a Stripe "
            "subscription to another price with proration behaviour $proration.",
            "Define ${verb}_$noun(client, subscription_id, price_id): retrieve the subscription, update its "
            "item to price_id, proration_behavior $proration.",
            "Upgrade a subscription to price_id with $proration. Name it ${verb}_$noun(client, "
            "subscription_id, price_id).",
        ),
        solution="""
            from stripe import StripeClient


            def ${verb}_$noun(client: StripeClient, subscription_id, price_id):
                subscription = client.v1.subscriptions.retrieve(subscription_id)
                item_id = subscription.items.data[0].id
                return client.v1.subscriptions.update(
                    subscription_id,
                    params={
                        "items": [{"id": item_id, "price": price_id}],
                        "proration_behavior": "$proration",
                    },
                )
        """,
    ),
    Family(
        name="checkout_session",
        choices={
            "mode": ("payment", "subscription"),
            "success": ("success", "thanks", "done", "welcome"),
            "cancel": ("cart", "pricing", "cancelled"),
            "verb": ("start", "create", "open"),
        },
        phrasings=(
            "Write ${verb}_checkout(client, price_id) that creates a Stripe Checkout session in $mode mode "
            "for one price_id and returns its url; success goes to https://example.com/$success, cancel to "
            "https://example.com/$cancel.",
            "Define ${verb}_checkout(client, price_id): Checkout session, mode $mode, success page "
            "https://example.com/$success, cancel page https://example.com/$cancel. Return the url.",
            "I need a hosted payment page ($mode) for price_id. ${verb}_checkout(client, price_id) returns "
            "its url; success page https://example.com/$success, cancel page https://example.com/$cancel.",
        ),
        solution="""
            from stripe import StripeClient


            def ${verb}_checkout(client: StripeClient, price_id):
                session = client.v1.checkout.sessions.create(
                    params={
                        "mode": "$mode",
                        "line_items": [{"price": price_id, "quantity": 1}],
                        "success_url": "https://example.com/$success",
                        "cancel_url": "https://example.com/$cancel",
                    }
                )
                return session.url
        """,
    ),
    Family(
        name="webhook",
        choices={
            "event": (
                "checkout.session.completed",
                "charge.refunded",
                "customer.created",
                "customer.subscription.deleted",
                "invoice.paid",
                "invoice.payment_failed",
                "payment_intent.payment_failed",
                "payment_intent.succeeded",
                "payout.paid",
            ),
            "verb": ("handle_event", "handle_webhook", "read_event", "receive", "on_webhook"),
            "status": ("None", "False"),
        },
        phrasings=(
            "Write $verb(client, payload, signature, secret) that verifies a Stripe webhook and returns the "
            "object id of $event events; $status for a bad signature or another event.",
            "Define $verb(client, payload, signature, secret) with construct_event. Return the id of the "
            "object if the type is $event, else $status, also when the signature is wrong.",
            "Verify a webhook signature with StripeClient and react to $event only: $verb(client, payload, "
            "signature, secret) gives the object's id or $status.",
        ),
        solution="""
            from stripe import SignatureVerificationError, StripeClient


            def $verb(client: StripeClient, payload, signature, secret):
                try:
                    event = client.construct_event(payload, signature, secret)
                except SignatureVerificationError:
                    return $status
                if event.type != "$event":
                    return $status
                return event.data.object.id
        """,
    ),
    Family(
        name="invoice",
        choices={
            "currency": CURRENCIES,
            "days": ("7", "10", "14", "30"),
            "verb": ("send", "issue", "create"),
        },
        phrasings=(
            "Write ${verb}_invoice(client, customer_id, amount, description) that bills a Stripe customer "
            "in $currency by invoice, due in $days days, and finalizes it; return the hosted url.",
            "Define ${verb}_invoice(client, customer_id, amount, description): draft invoice with $days "
            "days until due, one $currency item, finalize, return hosted_invoice_url.",
            "Send a $currency invoice for one item with $days days to pay: ${verb}_invoice(client, "
            "customer_id, amount, description). Return its url.",
        ),
        solution="""
            from stripe import StripeClient


            def ${verb}_invoice(client: StripeClient, customer_id, amount, description):
                invoice = client.v1.invoices.create(
                    params={
                        "customer": customer_id,
                        "collection_method": "send_invoice",
                        "days_until_due": $days,
                    }
                )
                client.v1.invoice_items.create(
                    params={
                        "customer": customer_id,
                        "invoice": invoice.id,
                        "amount": amount,
                        "currency": "$currency",
                        "description": description,
                    }
                )
                return client.v1.invoices.finalize_invoice(invoice.id).hosted_invoice_url
        """,
    ),
    Family(
        name="billing_portal",
        choices={
            "page": ("account", "billing", "settings", "profile", "dashboard", "home"),
            "verb": ("open", "create", "make", "get"),
            "noun": ("portal", "billing_portal", "portal_link"),
        },
        phrasings=(
            "Write ${verb}_$noun(client, customer_id) that returns the url of a Stripe billing portal "
            "session with the return url https://example.com/$page.",
            "Define ${verb}_$noun(client, customer_id): customer portal session, back to "
            "https://example.com/$page, return the url.",
            "Let customers manage their own billing. ${verb}_$noun(client, customer_id) gives a portal url "
            "that returns to https://example.com/$page.",
        ),
        solution="""
            from stripe import StripeClient


            def ${verb}_$noun(client: StripeClient, customer_id):
                session = client.v1.billing_portal.sessions.create(
                    params={
                        "customer": customer_id,
                        "return_url": "https://example.com/$page",
                    }
                )
                return session.url
        """,
    ),
    Family(
        name="coupon",
        choices={
            "percent": ("5", "10", "15", "20", "25", "30", "40", "50"),
            "duration": ("once", "forever"),
            "verb": ("add", "create", "make", "new"),
            "noun": ("coupon", "discount"),
        },
        phrasings=(
            "Write ${verb}_$noun(client, name) that creates a Stripe coupon of $percent percent off, "
            "duration $duration, and returns its id.",
            "Define ${verb}_$noun(client, name): percent_off $percent, duration $duration, return the coupon's id.",
            "Create a coupon for $percent% off ($duration) with the stripe library as ${verb}_$noun(client, name).",
        ),
        solution="""
            from stripe import StripeClient


            def ${verb}_$noun(client: StripeClient, name):
                coupon = client.v1.coupons.create(
                    params={
                        "name": name,
                        "percent_off": $percent,
                        "duration": "$duration",
                    }
                )
                return coupon.id
        """,
    ),
    Family(
        name="connected_account",
        choices={
            "kind": ("customer", "charge", "payout", "product", "refund", "invoice"),
            "limit": ("3", "5", "10", "20", "50"),
            "verb": ("account", "list", "connected", "seller"),
        },
        phrasings=(
            "Write ${verb}_${kind}s(client, account_id) that lists the first $limit ${kind}s of a connected "
            "Stripe account.",
            "Define ${verb}_${kind}s(client, account_id): call the API on behalf of account_id and return "
            "up to $limit ${kind}s.",
            "Stripe Connect: read $limit ${kind}s of another account with the stripe_account option. Name "
            "it ${verb}_${kind}s(client, account_id).",
        ),
        solution="""
            from stripe import StripeClient


            def ${verb}_${kind}s(client: StripeClient, account_id):
                page = client.v1.${kind}s.list(
                    params={"limit": $limit},
                    options={"stripe_account": account_id},
                )
                return page.data
        """,
    ),
    Family(
        name="make_client",
        choices={
            "verb": ("make_client", "build_client", "stripe_client", "connect"),
            "variable": ("STRIPE_SECRET_KEY", "STRIPE_API_KEY", "STRIPE_KEY", "PAYMENTS_KEY"),
            "retries": ("1", "2", "3", "4", "5", "8"),
        },
        phrasings=(
            "Write $verb() that returns a StripeClient with the key from the environment variable $variable "
            "and $retries network retries.",
            "Define $verb(): a StripeClient, api key in os.environ $variable, max_network_retries $retries.",
            "How do I set up the stripe library? Key is in $variable, retry $retries times, function $verb().",
        ),
        solution="""
            import os

            from stripe import StripeClient


            def $verb():
                return StripeClient(os.environ["$variable"], max_network_retries=$retries)
        """,
    ),
)
