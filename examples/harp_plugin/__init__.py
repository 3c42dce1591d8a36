"""A plugin of the HARP proxy, heard through silbo's dispatcher. The page about it is docs/howto/harp.md.

python -m examples.harp_plugin.upstream 4001
python -m examples.harp_plugin examples/harp_plugin/harp.yml
curl -i http://127.0.0.1:4000/hello
"""
