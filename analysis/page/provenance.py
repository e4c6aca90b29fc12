"""What a page was made of: readable, and as JSON."""

from collections.abc import Mapping
from typing import Any

from analysis.page.markup import as_json, download, escaped, plain


def listed(made_of: Mapping[str, Any]) -> str:
    """HTML of a nested record, in its own order, with a link to it as JSON."""
    told = plain(made_of)
    record = _list(told) if told else "<p>Nothing is known of how this page was made.</p>"
    return f'{record}\n<p class="gets">{download(as_json(told), "application/json", "provenance.json", "JSON")}</p>'


def _list(entries: Mapping[str, Any]) -> str:
    rows = (f"<dt>{escaped(key.replace('_', ' '))}</dt><dd>{_told(value)}</dd>" for key, value in entries.items())
    return "<dl>\n" + "\n".join(rows) + "\n</dl>"


def _told(value: Any) -> str:
    if isinstance(value, dict) and value:
        return _list(value)
    if isinstance(value, list) and value:
        if all(
            isinstance(one, dict) and one and not any(isinstance(v, dict | list) for v in one.values()) for one in value
        ):
            return _rows(value)
        if not any(isinstance(one, dict | list) for one in value) and len(line := ", ".join(map(escaped, value))) < 80:
            return line
        return "<ul>" + "".join(f"<li>{_told(one)}</li>" for one in value) + "</ul>"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value in ({}, []) else escaped(value)


def _rows(records: list[dict[str, Any]]) -> str:
    """Records of one kind (proxies, stores …) as a small table."""
    keys = list(dict.fromkeys(key for record in records for key in record))
    heads = "".join(f'<th scope="col">{escaped(key.replace("_", " "))}</th>' for key in keys)
    body = "".join("<tr>" + "".join(f"<td>{_told(one.get(key))}</td>" for key in keys) + "</tr>" for one in records)
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
