"""The overview of a host as one HTML page, which stands alone: no script, and nothing from elsewhere.

One file, for the page is one: each section is a few short functions, made of the parts that all of them have.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import datetime
from shlex import quote
from typing import Final, NamedTuple

from silbo.brokers.redis.streams import DEFAULT_ADDRESS
from silbo.dispatch.source import find_source
from silbo.dispatch.traced import Traced, TracedListener
from silbo.dispatch.waterfall import (
    REASONS,
    describe_outcome,
    describe_state,
    find_bar,
    format_duration,
    show_name,
)
from silbo.health import Health
from silbo.operations.formatting import (
    format_age,
    format_count,
    format_number,
    format_options,
    format_place,
    format_time,
)
from silbo.operations.groups import ConsumerStatus, GroupStatus, LeftToNewer
from silbo.operations.listeners import ListenerInfo
from silbo.operations.markup import Markup, element, join
from silbo.operations.names import NameInfo
from silbo.operations.overview import (
    ConsumerOverview,
    DeadMessage,
    DispatcherOverview,
    OutboxOverview,
    Overview,
    StreamOverview,
)
from silbo.operations.page_style import CONTENT_SECURITY_POLICY, STYLE
from silbo.operations.plugins import PluginInfo
from silbo.outbox.rows import STATES

__all__ = ["render_page"]

LONGEST: Final = 2000
"""The most characters of an error or a payload: a page with many dead letters has to load."""
LISTENERS: Final = 50
"""Of a dispatch the first 50 listeners are shown, and of the others 50 that have failed."""
_COUNTS: Final = ("received", "handled", "failed", "retried", "dead")
"""The counts of a consumer that have a column of their own."""
_CLASSES: Final = {"completed": "good", "stopped": "warn", "failed": "bad", "cancelled": "bad"}
"""The class of each end of a dispatch or a call."""


class _Section(NamedTuple):
    """A part of the page.

    Attributes:
        id: For links to it.
        title: Its heading.
        content: Its HTML.
    """

    id: str
    title: str
    content: Markup


class _Column(NamedTuple):
    """A column of a table.

    Attributes:
        title: Its heading.
        class_: The class of its cells; None for none.
    """

    title: str
    class_: str | None = None


DEAD_COLUMNS: Final = (
    _Column("event"),
    _Column("id"),
    _Column("error"),
    _Column("attempts", "number"),
    _Column("died"),
)
"""The columns of dead letters and dead rows."""


def render_page(overview: Overview) -> str:
    """Return the page of an overview: HTML in ASCII, so that every file can hold it. Other characters are references."""
    sections = _make_sections(overview)
    page = element(
        "html",
        element(
            "head",
            element("meta", charset="utf-8"),
            element("meta", http_equiv="Content-Security-Policy", content=CONTENT_SECURITY_POLICY),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("meta", name="referrer", content="no-referrer"),
            element("title", f"{overview.title}: silbo"),
            element("style", Markup(STYLE)),
        ),
        element(
            "body",
            _make_header(overview, sections),
            element("main", (_render_section(section) for section in sections)),
        ),
        lang="en",
    )
    return f"<!doctype html>\n{page}\n".encode("ascii", "xmlcharrefreplace").decode("ascii")


def _make_header(overview: Overview, sections: Sequence[_Section]) -> Markup:
    process = overview.process
    links = (element("li", element("a", section.title, href=f"#{section.id}")) for section in sections)
    problems = [element("p", problem) for problem in overview.problems]
    return element(
        "header",
        element("h1", overview.title),
        element(
            "p",
            f"{process.host}, process {process.pid}. Read at ",
            _render_time(overview.at),
            ".",
            class_="quiet",
        ),
        element("nav", element("ul", links), aria_label="Sections"),
        element(
            "div", element("strong", "Not all could be read", class_="bad"), problems, class_="problems", role="alert"
        )
        if problems
        else None,
        element("ul", _make_figures(overview), class_="figures", aria_label="Figures"),
    )


def _make_figures(overview: Overview) -> Iterable[Markup]:
    """Return the numbers that a reader looks at first; in red those that should be 0."""
    names = [name for dispatcher in overview.dispatchers for name in dispatcher.names]
    yield _render_figure(len(names), "event name", "event names")
    missed = sum(name.reaches_nobody for name in names)
    yield _render_figure(missed, "name that nobody hears", "names that nobody hears", should_be_none=True)
    if any(dispatcher.is_traced for dispatcher in overview.dispatchers):
        failed = [
            each for dispatcher in overview.dispatchers for each in dispatcher.dispatches if each.outcome == "failed"
        ]
        yield _render_figure(len(failed), "failed, of the last dispatches", should_be_none=True)
    if overview.plugins:
        off = sum(plugin.state == "off" for plugin in overview.plugins)
        of_all = f"off, of {len(overview.plugins)}"
        yield _render_figure(off, f"plugin {of_all}", f"plugins {of_all}", should_be_none=True)
    if overview.streams is not None:
        groups = [group for stream in overview.streams for group in stream.groups]
        yield _render_figure(sum(group.lag for group in groups), "not yet given to a group")
        yield _render_figure(sum(group.in_hand for group in groups), "in hand")
        yield _render_figure(sum(group.retrying for group in groups), "waiting for a retry")
        if newer := sum(group.newer.count for group in groups if group.newer is not None):
            yield _render_figure(newer, "waiting for a newer version")
        dead = sum(stream.dead for stream in overview.streams)
        yield _render_figure(dead, "dead letter", "dead letters", should_be_none=True)
    if overview.outbox is not None:
        counts = overview.outbox.status.counts
        is_deserted = not overview.outbox.status.leads
        label = "waiting in the outbox, without a relay" if is_deserted else "waiting in the outbox"
        yield _render_figure(counts["pending"] + counts["sending"], label, should_be_none=is_deserted)
        yield _render_figure(counts["dead"], "dead row in the outbox", "dead rows in the outbox", should_be_none=True)


def _render_figure(value: int, label: str, plural: str | None = None, *, should_be_none: bool = False) -> Markup:
    """Return a number with its label; ``plural`` is the label of other numbers than 1, if they have another one."""
    number = element("b", f"{value:,}", class_="bad" if should_be_none and value else None)
    return element("li", number, element("span", label if value == 1 else plural or label), class_="figure")


def _make_sections(overview: Overview) -> list[_Section]:
    """Return the sections: those without anything to show are left out, but for dispatches, names and streams."""
    many = len(overview.dispatchers) > 1
    sections = [
        _Section("dispatches", "Dispatches", join(_render_dispatches(each, many) for each in overview.dispatchers)),
        _Section("names", "Event names", join(_render_names(each, many) for each in overview.dispatchers)),
    ]
    if not overview.dispatchers:
        sections = [_Section("names", "Event names", _tell_no_dispatcher())]
    if overview.plugins:
        sections.append(_Section("plugins", "Plugins", _render_plugins(overview.plugins)))
    if overview.consumers:
        sections.append(_Section("consumers", "Consumers of this process", _render_consumers(overview.consumers)))
    if overview.parts:
        title = "Bridges, outboxes and relays of this process"
        sections.append(_Section("parts", title, _render_parts(overview.parts)))
    if overview.streams is not None:
        sections.append(_Section("streams", "Streams and groups", join(map(_render_stream, overview.streams))))
    if overview.outbox is not None:
        sections.append(_Section("outbox", "Outbox", _render_outbox(overview.outbox)))
    if overview.streams is not None:
        letters = [element("p", "There are none.")] if not any(stream.dead for stream in overview.streams) else []
        letters += [_render_letters(stream) for stream in overview.streams if stream.dead]
        sections.append(_Section("dead", "Dead letters", join(letters)))
    return sections


def _tell_no_dispatcher() -> Markup:
    return element(
        "p",
        "There is no dispatcher here. Give the page the object itself, ",
        element("code", "PageApp(dispatcher)"),
        ", or keep it in the application's state: ",
        element("code", "app.state.dispatcher = dispatcher"),
        ".",
    )


def _render_section(section: _Section) -> Markup:
    heading = element("h2", section.title, id=section.id)
    return element("section", heading, section.content, aria_labelledby=section.id)


# -- parts that several sections have ------------------------------------------------------------------------


def _render_table(caption: object, columns: Sequence[_Column], rows: Iterable[Sequence[object]]) -> Markup:
    """Return a table whose first column has the headings of the rows. On a narrow screen each row is a card."""
    body = [
        element(
            "tr",
            (
                _render_cell(column, cell, is_first=not at)
                for at, (column, cell) in enumerate(zip(columns, row, strict=True))
            ),
        )
        for row in rows
    ]
    heads = (element("th", column.title, scope="col", class_=column.class_) for column in columns)
    return element("table", element("caption", caption), element("thead", element("tr", heads)), element("tbody", body))


def _render_cell(column: _Column, cell: object, *, is_first: bool) -> Markup:
    if is_first:
        return element("th", cell, scope="row", class_=column.class_)
    return element("td", cell, class_=column.class_, data_label=column.title)


def _render_time(time: datetime, now: datetime | None = None) -> Markup:
    """Return a time; with ``now``, its age, with the time as the title."""
    text = format_time(time)
    shown = text if now is None else f"{format_age(time, now)} ago"
    return element("time", shown, datetime=time.isoformat(), title=None if now is None else text)


def _render_code(text: str) -> Markup | None:
    return element("code", text) if text else None


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({len(text):,} characters)"


def _render_if_many(many: bool, reference: str) -> Markup | None:
    """Return the heading of one dispatcher, if there are several."""
    return element("h3", element("code", reference)) if many else None


# -- dispatches ---------------------------------------------------------------------------------------------


def _render_dispatches(dispatcher: DispatcherOverview, many: bool) -> Markup:
    found: list[object] = [_render_if_many(many, dispatcher.reference)]
    if not dispatcher.is_traced:
        found.append(
            element(
                "p",
                "To see dispatches here, make the dispatcher with ",
                element("code", "AsyncEventDispatcher(observers=[silbo.Trace()])"),
                " and mount ",
                element("code", "PageApp"),
                " in the host. (",
                element("code", "silbo page"),
                " never has any: it is another process.)",
            )
        )
    elif not dispatcher.dispatches:
        found.append(element("p", "No dispatch has ended since the trace began."))
    else:
        found.append(
            element(
                "p",
                "The last ones, the newest first. A bar shows when a listener ran: ",
                element("span", class_="key busy"),
                " it held the event loop, ",
                element("span", class_="key wait"),
                " it waited.",
                class_="quiet",
            )
        )
        found += [_render_dispatch(traced, is_open=not at) for at, traced in enumerate(dispatcher.dispatches)]
    if dispatcher.unheard:
        rows = sorted(dispatcher.unheard.items(), key=lambda item: (-item[1], item[0]))
        columns = (_Column("name"), _Column("dispatches", "number"))
        found.append(
            _render_table(
                "Dispatched names that no listener is meant for: is one misspelt?",
                columns,
                [(element("code", name), f"{count:,}") for name, count in rows[:100]],
            )
        )
    return join(found)


def _render_dispatch(traced: Traced, *, is_open: bool) -> Markup:
    shown = list(traced.listeners[:LISTENERS])
    shown += [each for each in traced.listeners[LISTENERS:] if each.error][:LISTENERS]
    left_out = len(traced.listeners) - len(shown)
    summary = element(
        "summary",
        element("code", traced.name if isinstance(traced.name, str) else show_name(traced.name)),
        " ",
        element("span", describe_outcome(traced), class_=_CLASSES.get(traced.outcome)),
        " ",
        _render_time(traced.ended_at),
    )
    columns = (
        _Column("listener"),
        _Column("end"),
        _Column("time", "number whole"),
        _Column("waiting", "number whole"),
        _Column("from begin to end", "bar"),
    )
    table = (
        _render_table(
            f"{format_count(len(traced.listeners), 'listener')} in {format_duration(traced.duration, traced.waited)}",
            columns,
            [_to_waterfall_cells(each, traced) for each in shown],
        )
        if traced.listeners
        else element("p", "Nobody listens.")
    )
    event = element("p", "event: ", element("code", traced.event)) if traced.event else None
    more = element("p", f"and {left_out:,} more", class_="quiet") if left_out else None
    return element("details", summary, event, table, more, class_="dispatch", open=is_open)


def _to_waterfall_cells(each: TracedListener, traced: Traced) -> tuple[object, ...]:
    source = find_source(each.listener)
    who = join(
        element("code", source.name),
        element("span", f" [{each.owner}]", class_="quiet") if each.owner else None,
        element("div", format_place(source.place), class_="quiet") if source.place else None,
    )
    state = element("span", describe_state(each), class_=_CLASSES.get(each.outcome or "", "quiet"))
    why = element("div", REASONS[each.reason] if each.reason is not None else _cut(each.error))
    if each.outcome is None:
        return who, join(state, why), None, None, None
    return (
        who,
        join(state, why if each.error else None),
        format_duration(each.duration, None),
        format_duration(each.waited, None) if each.waited else None,
        _render_bar(each, traced),
    )


def _render_bar(each: TracedListener, traced: Traced) -> Markup:
    begin, on_loop, waiting = find_bar(each, traced)
    label = f"begins after {format_duration(each.began, None)}, takes {format_duration(each.duration, each.waited)}"
    bars = [
        element(
            "rect", class_=class_, x=f"{place * 1000:.1f}", y="0", width=f"{max(length * 1000, 2):.1f}", height="10"
        )
        for class_, place, length in (("wait", begin + on_loop, waiting), ("busy", begin, on_loop))
        if length
    ]
    return element("svg", bars, viewBox="0 0 1000 10", preserveAspectRatio="none", role="img", aria_label=label)


# -- names and listeners ------------------------------------------------------------------------------------


def _render_names(dispatcher: DispatcherOverview, many: bool) -> Markup:
    found: list[object] = [_render_if_many(many, dispatcher.reference)]
    columns = (_Column("name"), _Column("event"), _Column("heard by"))
    if dispatcher.names:
        caption = (
            f"{format_count(len(dispatcher.names), 'name')}; a bridge, and a listener for all names, count for none"
        )
        found.append(_render_table(caption, columns, map(_to_name_cells, dispatcher.names)))
    else:
        found.append(element("p", "No names are declared, and none has a listener."))
    if dispatcher.others:
        others = (_Column("registered for"), _Column("listener"), _Column("priority", "number"), _Column("options"))
        rows = [
            (
                element("code", each.name),
                _render_listener(each),
                format_number(each.priority),
                format_options(each.options),
            )
            for each in dispatcher.others
        ]
        found.append(_render_table("Listeners for many names", others, rows))
    return join(found)


def _to_name_cells(name: NameInfo) -> tuple[object, ...]:
    remarks = [
        element("div", "not declared", f"; did you mean {name.similar}?" if name.similar else None, class_="warn")
        if not name.is_declared and not name.is_consumed
        else None,
        element("div", f"deprecated: {name.deprecated}", class_="warn") if name.deprecated else None,
        element("div", name.description, class_="quiet") if name.description else None,
    ]
    facts = [name.kind, f"key {name.key}" if name.key else "", f"version {name.version}" if name.version != 1 else ""]
    facts.append("consumed" if name.is_consumed else "")
    event = join(
        _render_code(name.cls),
        element("div", ", ".join(filter(None, facts)), class_="quiet"),
        _render_fields(name) if name.fields else None,
    )
    return join(element("code", name.name), remarks), event if name.cls or any(facts) else None, _render_heard_by(name)


def _render_fields(name: NameInfo) -> Markup:
    fields = (
        element(
            "li",
            element("code", f"{each.name}{'' if each.is_required else '?'}{f': {each.type}' if each.type else ''}"),
        )
        for each in name.fields
    )
    return element("details", element("summary", format_count(len(name.fields), "field")), element("ul", fields))


def _render_heard_by(name: NameInfo) -> Markup:
    if not name.listeners:
        hint = f"; {name.similar} has listeners: is that misspelt?" if name.is_declared and name.similar else None
        if name.reaches_nobody:
            return element("span", "nobody", hint, class_="bad")
        way = "a bridge sends it" if name.leaves else "a bridge sends its events, if their class has a kind"
        return element("span", f"nobody here; {way}", hint)
    summary = ", ".join(listener.listener for listener in name.listeners)
    return element(
        "details",
        element("summary", summary),
        element("ol", (element("li", _render_listener(each, at_length=True)) for each in name.listeners)),
    )


def _render_listener(each: ListenerInfo, *, at_length: bool = False) -> Markup:
    """Return the name, plugin and place of a listener; at length also its priority and options."""
    facts = [f"priority {format_number(each.priority)}", format_options(each.options)] if at_length else []
    return join(
        element("code", each.listener),
        element("span", f" [{each.plugin}]", class_="quiet") if each.plugin else None,
        element("div", ", ".join(filter(None, facts))) if facts else None,
        element("div", f"off: {each.off}", class_="bad") if each.off else None,
        element("div", format_place(each.place), class_="quiet") if each.place else None,
    )


# -- plugins and consumers ----------------------------------------------------------------------------------


def _render_plugins(plugins: Sequence[PluginInfo]) -> Markup:
    columns = (
        _Column("plugin"),
        _Column("state"),
        _Column("listens to"),
        _Column("needs"),
        _Column("failures", "number"),
        _Column("tasks", "number"),
    )
    rows = [
        (
            f"{plugin.name} {plugin.version or ''}".rstrip(),
            element("span", "off", f": {plugin.reason}" if plugin.reason else None, class_="bad")
            if plugin.state == "off"
            else element("span", "on", class_="good"),
            ", ".join(dict.fromkeys(listener.name for listener in plugin.listeners)),
            ", ".join(plugin.requires),
            f"{plugin.failures:,}",
            f"{plugin.tasks:,}",
        )
        for plugin in plugins
    ]
    return _render_table("In the order in which their listeners of equal priority run", columns, rows)


def _render_consumers(consumers: Sequence[ConsumerOverview]) -> Markup:
    columns = (
        _Column("consumer"),
        _Column("state"),
        _Column("in hand", "number"),
        *(_Column(count, "number") for count in _COUNTS),
        _Column("others"),
        _Column("last error"),
    )
    return _render_table("Counts since each was made", columns, map(_to_consumer_cells, consumers))


def _to_consumer_cells(consumer: ConsumerOverview) -> tuple[object, ...]:
    health, counts = consumer.health, asdict(consumer.stats)
    waiting = {"wait for a retry": health.waiting_for_retry, "wait for a newer version": health.waiting_for_newer}
    others = {**waiting, **{name: count for name, count in counts.items() if name not in _COUNTS}}
    return (
        f"{consumer.app}, group {consumer.group}" if consumer.group else consumer.app,
        _render_state(health),
        f"{health.in_hand:,}",
        *(f"{counts[name]:,}" for name in _COUNTS),
        ", ".join(f"{count:,} {name}" for name, count in others.items() if count),
        _render_last_error(health),
    )


def _render_parts(parts: Sequence[Health]) -> Markup:
    columns = (_Column("part"), _Column("state"), _Column("in hand", "number"), _Column("last error"))
    rows = [
        (f"{health.part} {health.name}", _render_state(health), f"{health.in_hand:,}", _render_last_error(health))
        for health in parts
    ]
    return _render_table("In hand: what a relay sends now, and what a bridge has under way", columns, rows)


def _render_state(health: Health) -> Markup:
    class_ = "good" if health.is_ready else "bad" if health.is_running else "quiet"
    return element("span", health.explain(), class_=class_)


def _render_last_error(health: Health) -> Markup | None:
    error = health.last_error
    return None if error is None else join(element("div", _cut(error.text)), _render_time(error.at))


# -- streams, outbox and dead letters -----------------------------------------------------------------------


def _render_stream(stream: StreamOverview) -> Markup:
    now = stream.groups[0].read_at if stream.groups else None
    span = (
        [": the oldest ", _render_time(stream.first_at, now), ", the newest ", _render_time(stream.last_at, now)]
        if stream.first_at and stream.last_at
        else []
    )
    caption = join(element("code", stream.key), f", {format_count(stream.length, 'message')}", span)
    if not stream.groups:
        return join(element("p", caption), element("p", "No consumer group has been here yet.", class_="warn"))
    columns = (
        _Column("group"),
        _Column("lag", "number"),
        _Column("in hand", "number"),
        _Column("retrying", "number"),
        _Column("dead letters", "number"),
        _Column("consumers"),
        _Column("oldest in hand"),
    )
    return _render_table(caption, columns, map(_to_group_cells, stream.groups))


def _to_group_cells(group: GroupStatus) -> tuple[object, ...]:
    lag = f"{group.lag:,}{' or more' if group.lag_is_at_least else ''}"
    waits = f" for {format_age(group.waiting_since, group.read_at)}" if group.waiting_since and group.lag else ""
    live = sum(not consumer.is_silent for consumer in group.consumers)
    summary = f"{live} of {len(group.consumers)} alive" if live < len(group.consumers) else f"{live} alive"
    consumers = element(
        "details",
        element("summary", element("span", summary, class_="bad" if group.is_deserted else None)),
        element("ul", (element("li", _describe_consumer(each, group)) for each in group.consumers)),
    )
    oldest = group.oldest
    stuck = (
        join(
            element("code", oldest.entry),
            f", {format_age(oldest.added_at, group.read_at)}, at {oldest.consumer}",
            element("div", format_count(oldest.attempts, "attempt")) if oldest.attempts else None,
            element("div", _cut(oldest.error), class_="bad") if oldest.error else None,
            element("div", "No attempt has failed: does a listener hang?", class_="bad") if group.is_stuck else None,
        )
        if oldest is not None
        else None
    )
    none_here = element("span", "nobody", class_="bad")
    return (
        group.group,
        lag + waits,
        join(f"{group.in_hand:,}", _render_newer(group.newer, group.read_at) if group.newer else None),
        f"{group.retrying:,}",
        element("span", f"{group.dead:,}", class_="bad" if group.dead else None),
        consumers if group.consumers else none_here,
        stuck,
    )


def _render_newer(newer: LeftToNewer, now: datetime) -> Markup:
    waits = "waits" if newer.count == 1 else "wait"
    return element(
        "div",
        f"{newer.count:,} {waits} for {newer.wanted}, the first for {format_age(newer.since, now)}",
        class_="warn",
    )


def _describe_consumer(consumer: ConsumerStatus, group: GroupStatus) -> str:
    where = f"{consumer.process.host}, process {consumer.process.pid}" if consumer.process else consumer.name
    silent = ", silent" if consumer.is_silent else ""
    return f"{where}: {consumer.in_hand:,} in hand, seen {format_age(consumer.seen_at, group.read_at)} ago{silent}"


def _render_outbox(outbox: OutboxOverview) -> Markup:
    status = outbox.status
    oldest = (
        ["The oldest that waits was stored ", _render_time(status.oldest_at, outbox.read_at), ". "]
        if status.oldest_at
        else []
    )
    relays = (
        f"{format_count(len(status.leads), 'partition')} led by {', '.join(sorted({lead.owner for lead in status.leads.values()}))}."
        if status.leads
        else element("span", "No relay is at work.", class_="bad")
    )
    counts = [
        _render_figure(status.counts[state], f"{state} row", f"{state} rows", should_be_none=state == "dead")
        for state in STATES
    ]
    figures = element("ul", counts, class_="figures", aria_label="Rows")
    dead = _render_table(
        "The oldest dead rows; silbo outbox retry makes them pending again",
        DEAD_COLUMNS,
        [_to_dead_cells(row, outbox.read_at) for row in outbox.rows],
    )
    return join(element("p", oldest, relays), figures, dead if outbox.rows else None)


def _render_letters(stream: StreamOverview) -> Markup:
    """Return the dead letters of a stream; those of one group, event and error, without payloads, are one row."""
    now = stream.groups[0].read_at if stream.groups else None
    alike: dict[object, list[DeadMessage]] = {}
    for letter in stream.letters:
        kind = (letter.group, letter.name, letter.error) if letter.payload is None else letter.id
        alike.setdefault(kind, []).append(letter)
    groups = sorted({letter.group for letter in stream.letters if letter.group})
    caption = join(
        element("code", stream.key),
        f": {format_count(stream.dead, 'dead letter')}",
        f", the newest {len(stream.letters)} of them" if stream.dead > len(stream.letters) else None,
        "; to give them back: " if groups else None,
        (
            join(", " if at else None, element("code", _write_retry(stream.key, group)))
            for at, group in enumerate(groups)
        ),
    )
    return _render_table(caption, DEAD_COLUMNS, [_to_dead_cells(first, now, more) for first, *more in alike.values()])


def _write_retry(stream: str, group: str) -> str:
    """Return the command that gives the dead letters of a group back to it."""
    prefix, _, address = stream.removesuffix("}").rpartition(":{")
    of_stream = "" if address == DEFAULT_ADDRESS else f" --stream {quote(address)}"
    return f"silbo dead retry --prefix {quote(prefix)}{of_stream} --group {quote(group)}"


def _to_dead_cells(message: DeadMessage, now: datetime | None, more: Sequence[DeadMessage] = ()) -> tuple[object, ...]:
    """Return the values of DEAD_COLUMNS; the ids of ``more``, which are like the message, can be opened."""
    ids = join(
        message.id,
        element("details", element("summary", f"and {len(more):,} like it"), ", ".join(letter.id for letter in more))
        if more
        else None,
    )
    event = join(
        element("code", message.name) if message.name else element("span", "unreadable", class_="bad"),
        element("div", message.event_id, class_="quiet") if message.event_id else None,
        element("div", f"given up by {message.group}") if message.group else None,
        element("details", element("summary", "payload"), element("code", _cut(message.payload)))
        if message.payload is not None
        else None,
    )
    return event, ids, _cut(message.error), f"{message.attempts:,}", _render_time(message.died_at, now)
