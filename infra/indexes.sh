# Sourced by the scripts here: lets uv use the package indexes that pip is set up for, which it does not read itself.

pip_setting() { # PYTHON NAME: pip's value of NAME, from its environment variables or its files; empty when unset
  local variable
  variable="PIP_$(printf '%s' "$2" | tr 'a-z-' 'A-Z_')"
  if [ -n "${!variable:-}" ]; then
    printf '%s' "${!variable}"
  else
    "$1" -m pip config get "global.$2" 2>/dev/null || true
  fi
}

share_indexes_with_uv() { # PYTHON
  local value
  value="$(pip_setting "$1" index-url)"
  if [ -n "$value" ]; then export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$value}"; fi
  value="$(pip_setting "$1" extra-index-url)"
  if [ -n "$value" ]; then export UV_EXTRA_INDEX_URL="${UV_EXTRA_INDEX_URL:-$(echo $value)}"; fi
  value="$(pip_setting "$1" find-links)"
  if [ -n "$value" ]; then export UV_FIND_LINKS="${UV_FIND_LINKS:-$(echo $value | tr ' ' ',')}"; fi
  value="$(pip_setting "$1" cert)"
  if [ -n "$value" ]; then export SSL_CERT_FILE="${SSL_CERT_FILE:-$value}"; fi
  # As pip does: the best version of all indexes, not all versions of the first index that has the name.
  export UV_INDEX_STRATEGY="${UV_INDEX_STRATEGY:-unsafe-best-match}"
}
