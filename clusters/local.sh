#!/bin/sh
# Start the head of clusters/local.yaml on this machine. More options go to `ray start`:
#   sh clusters/local.sh --dashboard-port 8300 --dashboard-agent-listen-port 8301
# and then submit with --cluster clusters/local.yaml --address http://127.0.0.1:8300.
# CONFIG and PORT in the environment replace the cluster file and its port 6379, which a copy of
# the file must name, too (gcs_address). A second Ray on this machine needs other ports throughout.
set -eu
config=${CONFIG:-$(dirname "$0")/local.yaml}
head_node_id=$(sed -n 's/^ *head_node_id: *\([0-9a-f]*\).*/\1/p' "$config")

export RAY_AUTH_MODE=token        # nobody without the token of ~/.ray/auth_token
export RAY_FAKE_CLUSTER=1         # the provider that starts processes asks for it
export RAY_enable_autoscaler_v2=1 # the one that places by labels
export RAY_CLOUD_INSTANCE_ID="$head_node_id" RAY_OVERRIDE_NODE_ID_FOR_TESTING="$head_node_id"
export RAY_NODE_TYPE_NAME=ray.head.default
export AUTOSCALER_UPDATE_INTERVAL_S=1
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 # then Ray listens on 127.0.0.1 only

exec ray start --head --block --disable-usage-stats \
    --port="${PORT:-6379}" --dashboard-host=127.0.0.1 \
    --num-cpus=0 --labels=ray.io/market-type=on-demand --autoscaling-config="$config" "$@"
