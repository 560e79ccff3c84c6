"""A verb's values as YAML that `--config` reads back, with the origins as comments; a schema as JSON."""

from __future__ import annotations

import json

from ferry.core.verb import Result


def report(result: Result) -> str:
    """Return the text to print."""
    if "values" not in result:
        return json.dumps(result, indent=1, ensure_ascii=False)
    lines = [f"{result['verb']}:"]
    origins: dict[str, str] = result.get("origins", {})
    for name, value in result["values"].items():
        places = sorted({origin for path, origin in origins.items() if path == name or path.startswith(f"{name}.")})
        note = f"  # {', '.join(places)}" if places else ""
        lines.append(f"  {name}: {_flow(value)}{note}")
    return "\n".join(lines)


def _flow(value: object) -> str:
    import yaml

    text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6)
    return text.removesuffix("...\n").strip()
