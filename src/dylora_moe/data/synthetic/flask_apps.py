"""The `flask` skill, second half: factories, blueprints, hooks, sessions and error handlers."""

from dylora_moe.data.synthetic.family import Family
from dylora_moe.data.synthetic.words import NOUNS, READ_VERBS

_NOUN = {"noun": NOUNS}

FAMILIES = (
    Family(
        name="error_handler",
        choices={
            "code|name": (
                "404|not_found",
                "405|not_allowed",
                "500|server_error",
                "403|forbidden",
                "413|too_large",
            ),
            "key": ("error", "message", "detail", "reason"),
            "text": ("sorry", "try again", "see the docs", "not possible", "went wrong"),
        },
        phrasings=(
            "Write a Flask app that answers status $code with the JSON $key: $text; name the handler $name.",
            "Flask: JSON instead of HTML for error $code. Handler $name returns $key '$text'.",
            "Register an error handler $name for $code in Flask whose body is JSON with $key set to '$text'.",
        ),
        solution="""
            from flask import Flask

            app = Flask(__name__)


            @app.errorhandler($code)
            def $name(error):
                return {"$key": "$text"}, $code
        """,
    ),
    Family(
        name="own_exception",
        choices=_NOUN | {"ending": ("Missing", "Locked", "Invalid", "Conflict"), "code": ("400", "409", "422", "423")},
        phrasings=(
            "Write a Flask app whose view show_$noun at /${noun}s/<name> raises $ending, and a handler that "
            "turns it into status $code with its text as JSON error.",
            "Flask: when a view raises $ending, answer $code and {'error': text}. Show it with show_$noun "
            "at /${noun}s/<name>.",
            "Define the exception $ending and its Flask error handler (status $code, JSON error). The view "
            "show_$noun for /${noun}s/<name> raises it.",
        ),
        solution="""
            from flask import Flask

            app = Flask(__name__)


            class $ending(Exception):
                pass


            @app.errorhandler($ending)
            def on_error(error):
                return {"error": str(error)}, $code


            @app.get("/${noun}s/<name>")
            def show_$noun(name):
                raise $ending(f"$noun {name}")
        """,
    ),
    Family(
        name="blueprint",
        choices=_NOUN | {"prefix": ("api", "v1", "admin", "shop", "internal")},
        phrasings=(
            "Write a Flask blueprint bp for ${noun}s with the url prefix /$prefix/${noun}s; its index view "
            "returns an empty list. Register it on app.",
            "Flask with a blueprint: ${noun}s live under /$prefix/${noun}s, GET there gives []. Use the "
            "names bp and app.",
            "Put the ${noun}s views into a Flask Blueprint mounted at /$prefix/${noun}s and register it.",
        ),
        solution="""
            from flask import Blueprint, Flask

            bp = Blueprint("${noun}s", __name__, url_prefix="/$prefix/${noun}s")


            @bp.get("/")
            def index():
                return []


            app = Flask(__name__)
            app.register_blueprint(bp)
        """,
    ),
    Family(
        name="check_key_before",
        choices=_NOUN
        | {
            "header": ("X-API-Key", "X-Auth-Token", "X-Access-Key"),
            "setting": ("API_KEY", "ACCESS_KEY", "TOKEN"),
            "code": ("401", "403"),
        },
        phrasings=(
            "Write a Flask app that checks the header $header against app.config $setting before every "
            "request and aborts with $code; GET /${noun}s returns [].",
            "Flask before_request auth: $code unless $header equals the config value $setting. Protect "
            "/${noun}s, which gives an empty list.",
            "Protect all views of a Flask app with $header. The key is in app.config['$setting'], a wrong "
            "one means $code. Add a view for /${noun}s.",
        ),
        solution="""
            import hmac

            from flask import Flask, abort, request

            app = Flask(__name__)


            @app.before_request
            def check_key():
                key = request.headers.get("$header", "")
                if not hmac.compare_digest(key.encode(), app.config["$setting"].encode()):
                    abort($code)


            @app.get("/${noun}s")
            def list_${noun}s():
                return []
        """,
    ),
    Family(
        name="login_required",
        choices=_NOUN
        | {
            "decorator": ("login_required", "require_login", "signed_in"),
            "key": ("user", "user_id", "account"),
        },
        phrasings=(
            "Write a Flask decorator $decorator that answers 401 unless $key is in the session, and use it "
            "on my_${noun}s at /my/${noun}s.",
            "Flask: define $decorator (checks session for $key, else abort 401) and protect GET "
            "/my/${noun}s, view my_${noun}s, returning [].",
            "How do I protect a single Flask view? Decorator $decorator, session key $key, 401 otherwise, "
            "applied to my_${noun}s on /my/${noun}s.",
        ),
        solution="""
            from functools import wraps

            from flask import Flask, abort, session

            app = Flask(__name__)


            def $decorator(view):
                @wraps(view)
                def wrapper(*args, **kwargs):
                    if "$key" not in session:
                        abort(401)
                    return view(*args, **kwargs)

                return wrapper


            @app.get("/my/${noun}s")
            @$decorator
            def my_${noun}s():
                return []
        """,
    ),
    Family(
        name="session_login",
        choices={
            "key": ("user", "username", "member", "account", "player", "nickname"),
            "enter": ("login", "signin", "enter", "join"),
            "leave": ("logout", "signout", "leave", "forget"),
        },
        phrasings=(
            "Write a Flask app with POST /$enter that keeps the form field $key in the session and POST "
            "/$leave that forgets it; both answer 204. The secret comes from SECRET_KEY in the environment.",
            "Flask session: views $enter and $leave (POST) store and drop $key from the form, status 204, "
            "secret key from os.environ SECRET_KEY.",
            "Use the Flask session to remember $key: /$enter saves it, /$leave removes it. POST, 204, "
            "SECRET_KEY from the environment.",
        ),
        solution="""
            import os

            from flask import Flask, request, session

            app = Flask(__name__)
            app.secret_key = os.environ["SECRET_KEY"]


            @app.post("/$enter")
            def $enter():
                session["$key"] = request.form["$key"]
                return "", 204


            @app.post("/$leave")
            def $leave():
                session.pop("$key", None)
                return "", 204
        """,
    ),
    Family(
        name="app_factory",
        choices={
            "name": ("create_app", "make_app", "build_app"),
            "setting": ("TITLE", "OWNER", "REGION", "VERSION", "STAGE"),
            "default": ("demo", "test", "local", "draft"),
            "path": ("config", "about", "settings"),
        },
        phrasings=(
            "Write a Flask app factory $name(config=None): default $setting '$default', overridden by "
            "config; GET /$path returns it as JSON value.",
            "Flask application factory $name(config=None) with the setting $setting = '$default' and a "
            "route /$path that shows its value.",
            "Define $name(config=None) for Flask. It sets $setting to '$default', updates from config and "
            "serves /$path with {'value': setting}.",
        ),
        solution="""
            from flask import Flask


            def $name(config=None):
                app = Flask(__name__)
                app.config["$setting"] = "$default"
                app.config.update(config or {})

                @app.get("/$path")
                def show():
                    return {"value": app.config["$setting"]}

                return app
        """,
    ),
    Family(
        name="database_teardown",
        choices=_NOUN
        | {"setting": ("DATABASE", "DB_PATH", "SQLITE_FILE"), "verb": ("get_db", "database", "connection")},
        phrasings=(
            "Write a Flask app with $verb() that opens sqlite3 at app.config $setting once per request in g "
            "and closes it on teardown; GET /${noun}s/count counts the rows of ${noun}s.",
            "Flask and sqlite3: $verb() keeps one connection in g (file from config $setting), teardown "
            "closes it. Route /${noun}s/count returns the number of ${noun}s.",
            "Open a database per request in Flask: $verb(), config key $setting, teardown_appcontext. Serve "
            "the count of table ${noun}s at /${noun}s/count.",
        ),
        solution="""
            import sqlite3

            from flask import Flask, g

            app = Flask(__name__)


            def $verb():
                if "db" not in g:
                    g.db = sqlite3.connect(app.config["$setting"])
                return g.db


            @app.teardown_appcontext
            def close(error):
                if "db" in g:
                    g.pop("db").close()


            @app.get("/${noun}s/count")
            def count():
                return {"count": $verb().execute("SELECT COUNT(*) FROM ${noun}s").fetchone()[0]}
        """,
    ),
    Family(
        name="response_header",
        choices={
            "header|value": (
                "Cache-Control|no-store",
                "Cache-Control|no-cache",
                "Cache-Control|max-age=60",
                "X-Frame-Options|DENY",
                "X-Frame-Options|SAMEORIGIN",
                "X-Content-Type-Options|nosniff",
                "Referrer-Policy|no-referrer",
                "Referrer-Policy|same-origin",
                "X-Robots-Tag|noindex",
                "Access-Control-Allow-Origin|*",
            ),
            "name": ("add_headers", "set_header", "finish", "harden", "extend", "decorate"),
        },
        phrasings=(
            "Write a Flask after_request function $name that sets $header: $value on every response.",
            "Flask: every response should carry $header with the value $value. Call the hook $name.",
            "Define $name with app.after_request in Flask, adding the header $header = $value.",
        ),
        solution="""
            from flask import Flask

            app = Flask(__name__)


            @app.after_request
            def $name(response):
                response.headers["$header"] = "$value"
                return response
        """,
    ),
    Family(
        name="method_view",
        choices=_NOUN | {"suffix": ("View", "API", "Resource")},
        phrasings=(
            "Write a Flask MethodView class Item$suffix for /${noun}s: get returns the list ${noun}s, post "
            "appends the JSON body and returns it with 201.",
            "Flask class based view Item$suffix on /${noun}s with get (all ${noun}s) and post (add one, status 201).",
            "Use flask.views.MethodView: Item$suffix lists ${noun}s on GET and stores the JSON on POST /${noun}s.",
        ),
        solution="""
            from flask import Flask, jsonify, request
            from flask.views import MethodView

            app = Flask(__name__)
            ${noun}s = []


            class Item$suffix(MethodView):
                def get(self):
                    return jsonify(${noun}s)

                def post(self):
                    ${noun}s.append(request.get_json())
                    return ${noun}s[-1], 201


            app.add_url_rule("/${noun}s", view_func=Item$suffix.as_view("${noun}s"))
        """,
    ),
    Family(
        name="test_client",
        choices=_NOUN | {"verb": READ_VERBS, "code": ("200", "404")},
        phrasings=(
            "Write ${verb}_$noun(app, ${noun}_id) that calls GET /${noun}s/<id> with the Flask test client "
            "and returns the JSON if the status is $code, else None.",
            "Call a Flask app without a server: ${verb}_$noun(app, ${noun}_id) uses app.test_client() on "
            "/${noun}s and gives the JSON on $code, None otherwise.",
            "Define ${verb}_$noun(app, ${noun}_id) with Flask's test client; expect $code from "
            "/${noun}s/<id>, return its JSON or None.",
        ),
        solution="""
            from flask import Flask


            def ${verb}_$noun(app: Flask, ${noun}_id):
                response = app.test_client().get(f"/${noun}s/{${noun}_id}")
                return response.json if response.status_code == $code else None
        """,
    ),
    Family(
        name="request_time",
        choices={
            "header": ("X-Response-Time", "X-Duration", "X-Elapsed", "X-Runtime"),
            "start": ("start_timer", "begin", "before"),
            "stop": ("stop_timer", "report", "after"),
            "digits": ("1", "2", "3", "4", "6"),
        },
        phrasings=(
            "Write a Flask app that measures each request with $start and $stop hooks and sends the seconds "
            "in $header, $digits decimals.",
            "Flask: time every request. $start runs before, $stop after, and $header holds the seconds with "
            "$digits digits.",
            "Add $header with the request's duration in seconds ($digits decimals) to all Flask responses; "
            "hooks $start and $stop, time kept in g.",
        ),
        solution="""
            import time

            from flask import Flask, g

            app = Flask(__name__)


            @app.before_request
            def $start():
                g.start = time.perf_counter()


            @app.after_request
            def $stop(response):
                seconds = time.perf_counter() - g.start
                response.headers["$header"] = f"{seconds:.${digits}f}"
                return response
        """,
    ),
)
