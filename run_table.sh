for s in quickstart digits 32px dinov2 10x10; do
  .venv/bin/python -m hf_cdl compare recipes/comparisons/heads_$s.yaml --jobs 2 > /tmp/table_$s.log 2>&1
done
