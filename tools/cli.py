"""The command ``llm-datadist``."""

from __future__ import annotations

import click

from llm_datadist.tools.bench.command import bench
from llm_datadist.tools.check.command import check
from llm_datadist.tools.cluster_file import cluster_file
from llm_datadist.tools.demo.command import demo
from llm_datadist.tools.demo.network.check_command import demo_check
from llm_datadist.tools.demo.network.command import demo_worker
from llm_datadist.tools.launch import launch
from llm_datadist.tools.registry.serve_command import registry
from llm_datadist.tools.registry.status_command import registry_check, registry_status
from llm_datadist.tools.registry.switch_command import switch_role


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Move the KV cache of language models from prefill processes to decode processes."""


main.add_command(bench)
main.add_command(check)
main.add_command(cluster_file)
main.add_command(demo)
main.add_command(demo_check)
main.add_command(demo_worker)
main.add_command(launch)
main.add_command(registry)
main.add_command(registry_check)
main.add_command(registry_status)
main.add_command(switch_role)

if __name__ == "__main__":
    main(prog_name="llm-datadist")
