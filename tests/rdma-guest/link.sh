# Cuts and heals the wire between rxe0 (near) and rxe1 (far). Taking an end down removes its route: healing restores it.
link_cut() {
    case "$1" in
        near) ip link set v0 down ;;
        far) ip link set v1 down ;;
        silent) tc qdisc replace dev v0 root netem loss 100% ;;
    esac
}
link_heal() {
    tc qdisc del dev v0 root 2>/dev/null
    ip link set v0 up
    ip link set v1 up
    ip route replace 10.99.0.2 dev v0 src 10.99.0.1 table 102
    ip route replace 10.99.0.1 dev v1 src 10.99.0.2 table 101
}
link_lose() { tc qdisc replace dev v0 root netem loss "$1"; }
