#!/usr/bin/env bash
# Trains a harvested run on two "hosts": network namespaces with names, addresses and network stacks of their own, joined
# by a virtual cable. Compares the weights with those of one process and prints what went over the cable. Needs root.
#   scripts/test_two_hosts.sh RUN [FOLDER]     RUN stays as it is; FOLDER (default: a temporary one) takes two copies
set -euo pipefail
run=${1:?usage: scripts/test_two_hosts.sh RUN [FOLDER]}
work=${2:-$(mktemp -d)}
python=${SAEQL_PYTHON:-python}
id=$$
spaces=("saeql-$id-a" "saeql-$id-b")

cleanup() {
  for space in "${spaces[@]}"; do ip netns del "$space" 2>/dev/null || true; done
}
trap cleanup EXIT
for space in "${spaces[@]}"; do
  ip netns add "$space" || { echo "network namespaces need root" >&2; exit 3; }
  ip -n "$space" link set lo up
done
ip link add name wire netns "${spaces[0]}" type veth peer name wire netns "${spaces[1]}"
for n in 0 1; do
  ip -n "${spaces[n]}" address add "10.77.0.$((n + 1))/24" dev wire
  ip -n "${spaces[n]}" link set wire up
done

mkdir -p "$work"
for copy in two one; do
  cp -r "$run" "$work/$copy"
  rm -rf "$work/$copy/checkpoints" "$work/$copy/dictionaries" "$work/$copy/metrics.jsonl"
done

printf '127.0.0.1 localhost\n10.77.0.1 host-0\n10.77.0.2 host-1\n' >"$work/hosts"

host() { # host N COMMAND...: on host N, under a host name of its own
  local n=$1
  shift
  ip netns exec "${spaces[n]}" unshare --uts --mount sh -c \
    'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"' "host-$n" "$work/hosts" \
    env GLOO_SOCKET_IFNAME=wire "$@"
}
launch() {
  host "$1" "$python" -m torch.distributed.run --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d \
    --rdzv-endpoint 10.77.0.1:29400 --local-addr "10.77.0.$(($1 + 1))" -m saeql.pipelines train "$work/two"
}
launch 0 &
first=$!
launch 1 &
second=$!
wait "$first"
wait "$second"
sent=$(ip netns exec "${spaces[0]}" cat /sys/class/net/wire/statistics/tx_bytes)

"$python" -m saeql.pipelines train "$work/one"
"$python" - "$work" "$sent" <<'PYTHON'
import sys
from pathlib import Path

from safetensors.torch import load_file

from saeql.pipelines import Run

work, sent = Path(sys.argv[1]), int(sys.argv[2])
two, one = (Run.open(work / name) for name in ("two", "one"))
found, expected = (load_file(run.dictionary_path / "sae_weights.safetensors") for run in (two, one))
gap = max(float((found[name] - expected[name]).abs().max() / expected[name].abs().max().clamp_min(1)) for name in found)
steps = one.config.train.num_steps
print(f"largest difference of a weight, of the largest weight: {gap:.1e}")
print(f"sent by the first host: {sent / steps:,.0f} bytes a step")
sys.exit(gap > 1e-5)
PYTHON
