//! Mutations of minijinja templates: pieces that never end, grow without bound or cannot be written.

use crate::random::Random;

const PIECES: [&str; 34] = [
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "{% for i in range(10000000000) %}x{% endfor %}",
    "{{ range(99999) | list }}",
    "{{ 'a' * 1000000000 }}",
    "{{ 'a' * 9223372036854775807 }}",
    "{{ ('ab' * 10000000) * 100 }}",
    "{{ [1] * 100000000 }}",
    "{{ [[1] * 10000] * 10000 }}",
    "{{ messages | tojson(indent=1000000000000) }}",
    "{{ messages | tojson(indent=-1) }}",
    "{{ {'a': {'b': 1}} | tojson(indent=100000000) }}",
    "{{ 'a\nb' | indent(1000000000) }}",
    "{{ 'a' | center(1000000000) }}",
    "{{ 'a'.ljust(10000000000) }}",
    "{{ 'a'.rjust(10000000000) }}",
    "{{ 'a'.zfill(10000000000) }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '{:>1000000000}'.format(1) }}",
    "{{ 'aaaa' | replace('', 'b' * 10000000) }}",
    "{{ 'aaaaaaaaaaaaaaaa'.replace('a', 'a' * 100000000) }}",
    "{{ [1, 2] | batch(1000000000000) | list }}",
    "{{ [1, 2] | slice(1000000000000) | list }}",
    "{{ ('a' * 100000) | join('a' * 100000) }}",
    "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x | length }}",
    "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "{% for i in [[[1]]] recursive %}{{ loop([i]) }}{% endfor %}",
    "{% include 'other' %}",
    "{% extends 'other' %}",
    "{{ 1 / 0 }}{{ 1 % 0 }}{{ 1 // 0 }}",
    "{{ 9223372036854775807 + 1 }}{{ -9223372036854775807 * 3 }}{{ 2 ** 100000 }}",
    "{{ raise_exception('x' * 100000) }}",
    "{{ raise_exception('a\nerror: b\u{1b}[31m') }}",
    "{{ strftime_now('%Q%100000000000Y%') }}",
];

/// Adds a piece somewhere, at the end as often as not.
pub fn mutate(bytes: &mut Vec<u8>, random: &mut Random) {
    let piece = random.pick(&PIECES).as_bytes();
    let at = match random.below(2) {
        0 => bytes.len(),
        _ => random.below(bytes.len() + 1),
    };
    bytes.splice(at..at, piece.iter().copied());
}

/// Mutates a chat template inside the JSON string that holds it.
pub fn mutate_in_json(bytes: &mut Vec<u8>, random: &mut Random) {
    const KEY: &[u8] = b"\"chat_template\": \"";
    let found = bytes.windows(KEY.len()).position(|window| window == KEY);
    let Some(at) = found.map(|at| at + KEY.len()) else {
        return;
    };
    let piece = random
        .pick(&PIECES)
        .replace('\n', "\\n")
        .replace('"', "\\\"");
    bytes.splice(at..at, piece.bytes());
}
