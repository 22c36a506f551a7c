"""What a run of tools/bench found out, and its file: JSON, from which table, chart and page can be made again."""

import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures import Figure

FORMAT = 1


class ResultsError(Exception):
    """A file is no results file. One line: which, why."""


@dataclass(frozen=True)
class Outcome:
    """Of one comparison. name: as on the command line. peer: what vdev was held against. missing: why there are no
    figures, None: there are. commands: of the programs started. notes: what to know when reading the figures."""

    name: str
    peer: str
    figures: tuple[Figure, ...] = ()
    missing: str | None = None
    commands: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict:
        """For the results file."""
        return {"name": self.name, "peer": self.peer, "missing": self.missing, "notes": list(self.notes),
                "commands": list(self.commands), "figures": [figure.as_json() for figure in self.figures]}

    @classmethod
    def from_json(cls, fields: dict) -> "Outcome":
        """From the results file. Raises KeyError."""
        return cls(fields["name"], fields["peer"], tuple(map(Figure.from_json, fields["figures"])), fields["missing"],
                   tuple(fields["commands"]), tuple(fields["notes"]))


@dataclass(frozen=True)
class Results:
    """Of a whole run. machine: as machine.described() gives it, and the mode."""

    machine: dict
    outcomes: tuple[Outcome, ...]

    def save(self, path: Path) -> None:
        """Write the file. Raises OSError."""
        document = {"format": FORMAT, "machine": self.machine,
                    "comparisons": [outcome.as_json() for outcome in self.outcomes]}
        path.write_text(json.dumps(document, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Results":
        """Read the file. Raises ResultsError."""
        try:
            document = json.loads(path.read_text())
            if document["format"] != FORMAT:
                raise ResultsError(f"{path}: format {document['format']!r}, this tools/bench knows {FORMAT}")
            return cls(document["machine"], tuple(map(Outcome.from_json, document["comparisons"])))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ResultsError(f"{path}: not written by tools/bench --json ({error!r})") from None
