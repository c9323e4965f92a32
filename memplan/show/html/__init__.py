"""The report as one HTML page that needs no network, no script and no other file. jinja2 is opened here alone."""
