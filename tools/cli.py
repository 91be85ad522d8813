"""The command ``llm-datadist``."""

from __future__ import annotations

import click

from llm_datadist.tools.bench.command import bench
from llm_datadist.tools.cluster_file import cluster_file
from llm_datadist.tools.demo.command import demo
from llm_datadist.tools.launch import launch


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Move the KV cache of language models from prefill processes to decode processes."""


main.add_command(bench)
main.add_command(cluster_file)
main.add_command(demo)
main.add_command(launch)

if __name__ == "__main__":
    main(prog_name="llm-datadist")
