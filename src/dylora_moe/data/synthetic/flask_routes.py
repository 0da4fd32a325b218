"""The `flask` skill, first half: single views, from what a request carries to what is sent back."""

from dylora_moe.data.synthetic.family import Family
from dylora_moe.data.synthetic.words import NOUNS, OTHER_FIELDS, READ_VERBS, TEXT_FIELDS

_NOUN = {"noun": NOUNS}

FAMILIES = (
    Family(
        name="json_route",
        choices={
            "path": ("health", "status", "version", "about", "ping", "info", "api/status", "api/version"),
            "key": ("status", "service", "state", "message", "name"),
            "value": ("ok", "ready", "alive", "running", "up"),
        },
        phrasings=(
            "Write a Flask app with GET /$path that answers the JSON object $key: $value.",
            "Minimal Flask: a view for /$path returning JSON where $key is '$value'.",
            "I need a Flask endpoint /$path. The body should be JSON with $key set to $value.",
        ),
        solution="""
            from flask import Flask

            app = Flask(__name__)


            @app.get("/$path")
            def view():
                return {"$key": "$value"}
        """,
    ),
    Family(
        name="path_parameter",
        choices=_NOUN | {"verb": (*READ_VERBS, "show"), "converter": ("int", "string", "uuid")},
        phrasings=(
            "Write a Flask view ${verb}_$noun for GET /${noun}s/<${noun}_id> ($converter) that returns the "
            "$noun from the dict ${noun}s, or 404.",
            "Flask app with a dict ${noun}s: ${verb}_$noun serves one $noun by its $converter ${noun}_id "
            "from the path and aborts with 404 if there is none.",
            "How do I read a path parameter in Flask? Route /${noun}s/<$converter:${noun}_id>, view "
            "${verb}_$noun, look it up in ${noun}s, 404 when missing.",
        ),
        solution="""
            from flask import Flask, abort

            app = Flask(__name__)
            ${noun}s = {}


            @app.get("/${noun}s/<$converter:${noun}_id>")
            def ${verb}_$noun(${noun}_id):
                if ${noun}_id not in ${noun}s:
                    abort(404)
                return ${noun}s[${noun}_id]
        """,
    ),
    Family(
        name="create_from_json",
        choices=_NOUN | {"field": TEXT_FIELDS, "code": ("400", "422")},
        phrasings=(
            "Write a Flask view create_$noun for POST /${noun}s: the JSON body must have $field, else "
            "answer $code with an error; append it to the list ${noun}s and return 201.",
            "Flask POST /${noun}s with validation: $code if $field is missing from the JSON, otherwise "
            "store the $noun in ${noun}s and answer 201. View name create_$noun.",
            "Define create_$noun in a Flask app. It takes JSON at /${noun}s, requires $field (error $code) "
            "and returns the stored body with 201.",
        ),
        solution="""
            from flask import Flask, request

            app = Flask(__name__)
            ${noun}s = []


            @app.post("/${noun}s")
            def create_$noun():
                data = request.get_json(silent=True)
                if not isinstance(data, dict) or not data.get("$field"):
                    return {"error": "$field is required"}, $code
                ${noun}s.append(data)
                return data, 201
        """,
    ),
    Family(
        name="query_page",
        choices=_NOUN | {"size": ("10", "20", "25", "50"), "name": ("limit", "size", "per_page")},
        phrasings=(
            "Write a Flask view list_${noun}s for GET /${noun}s that pages through the list ${noun}s with "
            "the query args page (default 1) and $name (default $size).",
            "Flask pagination: /${noun}s?page=2&$name=$size returns that slice of ${noun}s as JSON. View "
            "list_${noun}s, defaults 1 and $size.",
            "Read page and $name from request.args in a Flask view list_${noun}s (defaults 1 and $size) and "
            "return the matching part of ${noun}s.",
        ),
        solution="""
            from flask import Flask, jsonify, request

            app = Flask(__name__)
            ${noun}s = []


            @app.get("/${noun}s")
            def list_${noun}s():
                page = request.args.get("page", 1, type=int)
                $name = request.args.get("$name", $size, type=int)
                start = (page - 1) * $name
                return jsonify(${noun}s[start : start + $name])
        """,
    ),
    Family(
        name="query_filter",
        choices=_NOUN | {"field": TEXT_FIELDS + OTHER_FIELDS, "verb": ("search", "find", "filter")},
        phrasings=(
            "Write a Flask view ${verb}_${noun}s for GET /${noun}s that returns those dicts in ${noun}s "
            "whose $field equals the query arg $field, or all without it.",
            "Flask: filter the list ${noun}s by ?$field=... in ${verb}_${noun}s at /${noun}s; no $field "
            "means everything.",
            "Define ${verb}_${noun}s, a Flask GET /${noun}s with an optional query parameter $field that "
            "filters ${noun}s.",
        ),
        solution="""
            from flask import Flask, jsonify, request

            app = Flask(__name__)
            ${noun}s = []


            @app.get("/${noun}s")
            def ${verb}_${noun}s():
                $field = request.args.get("$field")
                found = [$noun for $noun in ${noun}s if $field in (None, $noun.get("$field"))]
                return jsonify(found)
        """,
    ),
    Family(
        name="delete_one",
        choices=_NOUN | {"verb": ("delete", "remove", "drop"), "code": ("404", "410")},
        phrasings=(
            "Write a Flask view ${verb}_$noun for DELETE /${noun}s/<int:${noun}_id>: remove it from the "
            "dict ${noun}s and answer 204, or $code if it is not there.",
            "Flask DELETE endpoint: ${verb}_$noun pops ${noun}_id from ${noun}s; 204 on success, $code otherwise.",
            "Define ${verb}_$noun for a Flask app with a dict ${noun}s. DELETE by id gives 204 and an "
            "unknown id gives $code.",
        ),
        solution="""
            from flask import Flask, abort

            app = Flask(__name__)
            ${noun}s = {}


            @app.delete("/${noun}s/<int:${noun}_id>")
            def ${verb}_$noun(${noun}_id):
                if ${noun}s.pop(${noun}_id, None) is None:
                    abort($code)
                return "", 204
        """,
    ),
    Family(
        name="file_upload",
        choices={
            "field": ("file", "image", "photo", "document", "avatar", "report"),
            "folder": ("uploads", "files", "incoming", "data", "media"),
            "path": ("upload", "files", "import", "submit"),
        },
        phrasings=(
            "Write a Flask view upload for POST /$path that saves the uploaded $field under its secure name "
            "in the folder $folder; 400 without a file, 201 with the name.",
            "Flask file upload at /$path: form field $field, saved to $folder with secure_filename. Missing "
            "file is a 400.",
            "Accept a $field upload in Flask (POST /$path), store it in $folder and return its name with "
            "201, or 400 if nothing was sent.",
        ),
        solution="""
            from pathlib import Path

            from flask import Flask, request
            from werkzeug.utils import secure_filename

            app = Flask(__name__)


            @app.post("/$path")
            def upload():
                file = request.files.get("$field")
                name = secure_filename(file.filename or "") if file else ""
                if not file or not name:
                    return {"error": "$field is required"}, 400
                file.save(Path("$folder") / name)
                return {"name": name}, 201
        """,
    ),
    Family(
        name="redirect",
        choices=_NOUN | {"old": ("old", "legacy", "archive", "v1"), "code": ("301", "302", "308")},
        phrasings=(
            "Write a Flask app where GET /$old/${noun}s redirects with $code to the view list_${noun}s at "
            "/${noun}s, using url_for.",
            "Flask: the old address /$old/${noun}s should redirect ($code) to list_${noun}s, which serves "
            "/${noun}s and returns an empty list.",
            "Move /$old/${noun}s to /${noun}s in Flask. Use redirect and url_for with code $code; the new "
            "view is list_${noun}s.",
        ),
        solution="""
            from flask import Flask, redirect, url_for

            app = Flask(__name__)


            @app.get("/${noun}s")
            def list_${noun}s():
                return []


            @app.get("/$old/${noun}s")
            def old_${noun}s():
                return redirect(url_for("list_${noun}s"), code=$code)
        """,
    ),
    Family(
        name="stream_lines",
        choices=_NOUN | {"first": ("id", "name", "title"), "second": OTHER_FIELDS},
        phrasings=(
            "Write a Flask view stream_${noun}s at /${noun}s.jsonl that streams the list ${noun}s as JSON "
            "lines with only $first and $second.",
            "Stream from Flask: /${noun}s.jsonl, view stream_${noun}s, one JSON object with $first and "
            "$second for each $noun in ${noun}s.",
            "Define stream_${noun}s in Flask with a generator response of type application/x-ndjson: keys "
            "$first and $second of the list ${noun}s.",
        ),
        solution="""
            import json

            from flask import Flask

            app = Flask(__name__)
            ${noun}s = []


            @app.get("/${noun}s.jsonl")
            def stream_${noun}s():
                def lines():
                    for $noun in ${noun}s:
                        row = {key: $noun[key] for key in ("$first", "$second")}
                        yield json.dumps(row) + "\\n"

                return lines(), {"Content-Type": "application/x-ndjson"}
        """,
    ),
    Family(
        name="csv_export",
        choices=_NOUN | {"first": ("id", "name", "title"), "second": OTHER_FIELDS},
        phrasings=(
            "Write a Flask view export_${noun}s at /${noun}s.csv that returns the dicts in ${noun}s as CSV "
            "with the columns $first and $second.",
            "CSV download in Flask: /${noun}s.csv, view export_${noun}s, csv.DictWriter with $first and "
            "$second, rows from the list ${noun}s.",
            "Define export_${noun}s in Flask: the list ${noun}s as text/csv, header $first,$second, other "
            "keys ignored.",
        ),
        solution="""
            import csv
            import io

            from flask import Flask

            app = Flask(__name__)
            ${noun}s = []


            @app.get("/${noun}s.csv")
            def export_${noun}s():
                text = io.StringIO()
                writer = csv.DictWriter(text, ["$first", "$second"], extrasaction="ignore")
                writer.writeheader()
                writer.writerows(${noun}s)
                return text.getvalue(), {"Content-Type": "text/csv"}
        """,
    ),
    Family(
        name="template_string",
        choices=_NOUN | {"tag": ("h1", "h2", "p"), "word": ("Hello", "Welcome", "Details of", "About")},
        phrasings=(
            "Write a Flask view show_$noun for /${noun}s/<name> that renders the template string "
            "<$tag>$word {{ name }}</$tag>.",
            "Flask with render_template_string: /${noun}s/<name> in show_$noun shows '$word' and the name "
            "in a <$tag> tag, escaped.",
            "Define show_$noun, a Flask page at /${noun}s/<name>: a <$tag> saying $word and the name, as an "
            "inline Jinja template.",
        ),
        solution="""
            from flask import Flask, render_template_string

            app = Flask(__name__)


            @app.get("/${noun}s/<name>")
            def show_$noun(name):
                return render_template_string("<$tag>$word {{ name }}</$tag>", name=name)
        """,
    ),
    Family(
        name="set_cookie",
        choices={
            "name": ("theme", "lang", "currency", "timezone", "layout", "font"),
            "days": ("1", "7", "30", "90", "365"),
            "verb": ("set", "choose", "save", "store"),
        },
        phrasings=(
            "Write a Flask view ${verb}_$name for POST /$name/<value> that stores the value in the cookie "
            "$name for $days days (HttpOnly) and answers 204.",
            "Flask: remember the user's $name in a cookie. ${verb}_$name at POST /$name/<value>, httponly, "
            "max age $days days, status 204.",
            "Set a cookie in Flask: name $name, value from the path /$name/<value>, kept for $days days. "
            "The view is ${verb}_$name, 204.",
        ),
        solution="""
            from flask import Flask, make_response

            app = Flask(__name__)


            @app.post("/$name/<value>")
            def ${verb}_$name(value):
                response = make_response("", 204)
                response.set_cookie("$name", value, max_age=$days * 24 * 3600, httponly=True)
                return response
        """,
    ),
    Family(
        name="read_header",
        choices={
            "header": ("User-Agent", "Accept-Language", "X-Request-ID", "X-Client", "Referer", "Origin"),
            "path": ("whoami", "echo", "client", "headers", "debug"),
            "missing": ("unknown", "none", "missing", "-"),
        },
        phrasings=(
            "Write a Flask view for GET /$path that returns the request header $header as JSON under value, "
            "or '$missing' without it.",
            "Flask: echo the $header header at /$path in a JSON field value; '$missing' is the default.",
            "How do I read $header in Flask? Return it from /$path as JSON value, fall back to '$missing'.",
        ),
        solution="""
            from flask import Flask, request

            app = Flask(__name__)


            @app.get("/$path")
            def view():
                return {"value": request.headers.get("$header", "$missing")}
        """,
    ),
)
