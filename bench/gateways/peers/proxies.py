"""Shell. General-purpose proxies: the yardstick. One process (one thread) each, streams unbuffered,
connections kept alive on both sides.
"""

from __future__ import annotations

from bench.gateways.peers.peer import Command, Peer, PeerPlace, from_debian, library_path, program

NGINX_CONF = """
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log error;
worker_rlimit_nofile 65536;
events {{ worker_connections 16384; }}
http {{
  access_log off;
  server_tokens off;
  client_body_buffer_size 64k;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  keepalive_requests 1000000;
  upstream engine {{ server 127.0.0.1:{engine_port}; keepalive 4096; keepalive_requests 1000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://engine;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
      proxy_read_timeout 300s;
    }}
  }}
}}
"""

# Without http-no-delay tokens wait up to 200 ms for company (MSG_MORE).
HAPROXY_CONF = """
global
  maxconn 8000
  nbthread 1
defaults
  mode http
  option http-no-delay
  option http-keep-alive
  http-reuse always
  timeout connect 5s
  timeout client 300s
  timeout server 300s
frontend in
  bind 127.0.0.1:{port} backlog 4096
  default_backend engine
backend engine
  server mock 127.0.0.1:{engine_port} maxconn 8000 pool-max-conn 4096
"""


def _nginx(place: PeerPlace) -> Command:
    conf = place.folder / "nginx.conf"
    conf.write_text(
        NGINX_CONF.format(folder=place.folder, port=place.port, engine_port=place.engine_port)
    )
    argv = (
        program(place.cache, "nginx", "nginx"),
        "-p",
        str(place.folder),
        "-c",
        str(conf),
        "-e",
        str(place.folder / "error.log"),
    )
    return Command(argv, library_path(place.cache, "nginx"))


def _haproxy(place: PeerPlace) -> Command:
    conf = place.folder / "haproxy.cfg"
    conf.write_text(HAPROXY_CONF.format(port=place.port, engine_port=place.engine_port))
    return Command(
        (program(place.cache, "haproxy", "haproxy"), "-db", "-f", str(conf)),
        library_path(place.cache, "haproxy"),
    )


NGINX = Peer("nginx", from_debian("nginx", "nginx", "-v"), _nginx)
HAPROXY = Peer("haproxy", from_debian("haproxy", "haproxy", "-v"), _haproxy)
