//! Which methods pass, and in which direction.
//!
//! Enters: a method's name, exactly as it was written. Leaves: whether it passes. Never: a guess; what no known version
//! defines does not pass, as nobody knows what it would do to a server.

/// Which rules a message is under.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Era {
    /// Up to 2025-11-25: a session begins with `initialize`.
    Handshake,
    /// From 2026-07-28 on: each request says all that is to be known.
    Stateless,
}

pub const INITIALIZE: &str = "initialize";
pub const INITIALIZED: &str = "notifications/initialized";
pub const CALL: &str = "tools/call";
pub const LIST: &str = "tools/list";
pub const CANCELLED: &str = "notifications/cancelled";
pub const PROGRESS: &str = "notifications/progress";
/// A stream of notifications, which is answered at its end.
pub const SUBSCRIBE: &str = "subscriptions/listen";

/// Requests of agents in both eras.
const REQUESTS: [&str; 11] = [
    CALL,
    LIST,
    "completion/complete",
    "prompts/get",
    "prompts/list",
    "resources/list",
    "resources/read",
    "resources/templates/list",
    // 2025-11-25, and the extension `io.modelcontextprotocol/tasks` of 2026-07-28.
    "tasks/cancel",
    "tasks/get",
    "ping",
];
const HANDSHAKE_REQUESTS: [&str; 6] =
    [INITIALIZE, "logging/setLevel", "resources/subscribe", "resources/unsubscribe", "tasks/list", "tasks/result"];
/// Not `tasks/update`: by its `inputResponses` a call would go on in another way than the one that was decided.
const STATELESS_REQUESTS: [&str; 2] = ["server/discover", SUBSCRIBE];
const NOTIFICATIONS: [&str; 5] =
    [CANCELLED, PROGRESS, INITIALIZED, "notifications/roots/list_changed", "notifications/tasks/status"];
/// Requests of servers, of which only the first era has any.
const OF_SERVERS: [&str; 8] = [
    "elicitation/create",
    "ping",
    "roots/list",
    "sampling/createMessage",
    "tasks/cancel",
    "tasks/get",
    "tasks/list",
    "tasks/result",
];

/// A request of an agent.
pub fn is_request(method: &str, era: Era) -> bool {
    let of_era = match era {
        Era::Handshake => &HANDSHAKE_REQUESTS[..],
        Era::Stateless => &STATELESS_REQUESTS[..],
    };
    REQUESTS.contains(&method) || of_era.contains(&method)
}

/// A notification of an agent.
pub fn is_notification(method: &str) -> bool {
    NOTIFICATIONS.contains(&method)
}

/// A request of a server to its agent.
pub fn is_request_of_server(method: &str, era: Era) -> bool {
    era == Era::Handshake && OF_SERVERS.contains(&method)
}

/// A notification of a server: none of them makes an agent's side do anything but listen or ask again.
pub fn is_notification_of_server(method: &str) -> bool {
    method.strip_prefix("notifications/").is_some_and(|rest| !rest.is_empty() && rest.len() <= 64)
}

/// In which member of `params` a request names what it is about, for the header `Mcp-Name`.
pub fn name_member(method: &str) -> Option<&'static str> {
    match method {
        CALL | "prompts/get" => Some("name"),
        "resources/read" => Some("uri"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_spelling_is_another_method() {
        for era in [Era::Handshake, Era::Stateless] {
            assert!(is_request("tools/call", era));
            for spelling in [
                "Tools/call",
                "tools/Call",
                "tools/call ",
                " tools/call",
                "tools//call",
                "tools/call\0",
                "tools\\call",
                "",
            ] {
                assert!(!is_request(spelling, era), "{spelling:?}");
            }
        }
    }

    #[test]
    fn each_era_has_its_methods() {
        assert!(is_request("initialize", Era::Handshake) && !is_request("initialize", Era::Stateless));
        assert!(is_request("server/discover", Era::Stateless) && !is_request("server/discover", Era::Handshake));
        assert!(is_request("tasks/get", Era::Stateless) && !is_request("tasks/update", Era::Stateless));
        assert!(is_request_of_server("sampling/createMessage", Era::Handshake));
        assert!(!is_request_of_server("sampling/createMessage", Era::Stateless));
        assert!(!is_request_of_server("tools/call", Era::Handshake));
        assert!(!is_notification_of_server("tools/call") && is_notification_of_server("notifications/message"));
    }
}
