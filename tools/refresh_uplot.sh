#!/usr/bin/env bash
# Replaces the bundle of uPlot in the pages of reports with a version from npm: bash tools/refresh_uplot.sh 1.6.32
# The bundle is committed, so nothing else needs npm.  Run make test-browser afterwards.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VERSION=${1:?"expected a version of uPlot, as 1.6.32"}
PAGE=megatron_selfdistill/instruments/report/page
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT

npm pack --silent --pack-destination "$place" "uplot@$VERSION" >/dev/null
tar -xzf "$place"/uplot-*.tgz -C "$place"
cp "$place/package/dist/uPlot.iife.min.js" "$PAGE/uplot.min.js"
cp "$place/package/dist/uPlot.min.css" "$PAGE/uplot.min.css"
cp "$place/package/LICENSE" "$PAGE/uplot.LICENSE"
echo "uPlot $VERSION is in $PAGE; change the version in docs/report.md, and run make test-browser"
