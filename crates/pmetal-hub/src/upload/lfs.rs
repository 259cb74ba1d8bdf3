//! Large files go to the hub's store: Git LFS's batch API, in one piece (`basic`) or in several (`multipart`).

use std::{fs::File, io::Read};

use pmetal_core::Error as FileError;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::{
    BATCH, Session,
    folder::{Content, Item},
};
use crate::{
    Error, Result,
    client::{Failure, Payload, Request},
    download::hex,
};

const LFS_JSON: &str = "application/vnd.git-lfs+json";
const BUFFER: usize = 1 << 20;

/// Uploads what the store does not have yet, and returns the sha256 of each file.
pub(super) fn upload(session: &Session, items: &[&Item]) -> Result<Vec<String>> {
    let mut checksums = Vec::with_capacity(items.len());
    for item in items {
        if session.progress.stopped() {
            return Err(Error::Stopped);
        }
        checksums.push(sha256(item)?);
    }
    let all: Vec<(&Item, &String)> = items.iter().copied().zip(&checksums).collect();
    for batch in all.chunks(BATCH) {
        let actions = ask(session, batch)?;
        for (item, oid) in batch {
            let of_item = actions.iter().find(|object| object.get("oid").and_then(Value::as_str) == Some(oid.as_str()));
            transfer(session, item, oid, of_item)?;
        }
    }
    Ok(checksums)
}

fn sha256(item: &Item) -> Result<String> {
    let mut hash = Sha256::new();
    match &item.content {
        Content::Text(text) => hash.update(text),
        Content::Disk(path) => {
            let mut file = File::open(path).map_err(FileError::io("read", path))?;
            let mut buffer = vec![0; BUFFER];
            loop {
                let read = file.read(&mut buffer).map_err(FileError::io("read", path))?;
                if read == 0 {
                    break;
                }
                hash.update(buffer.get(..read).unwrap_or_default());
            }
        }
    }
    Ok(hex(&hash.finalize()))
}

/// Asks where each file should go.
fn ask(session: &Session, batch: &[(&Item, &String)]) -> Result<Vec<Value>> {
    let objects: Vec<Value> = batch.iter().map(|(item, oid)| json!({ "oid": oid, "size": item.size })).collect();
    let body = json!({
        "operation": "upload",
        "transfers": ["basic", "multipart"],
        "objects": objects,
        "hash_algo": "sha256",
        "ref": { "name": session.what.repo.revision() },
    });
    let url = format!("{}/{}.git/info/lfs/objects/batch", session.client.settings.endpoint, session.what.repo.id);
    let request = Request::new("POST", url.clone()).header("accept", LFS_JSON).header("content-type", LFS_JSON);
    let body = body.to_string();
    let request = request.payload(Payload::Bytes(body.as_bytes()));
    let answer = session.client.json(&request, session.client.settings.patience, session.progress);
    let answer = answer.map_err(|failure| session.error(failure))?;
    match answer.get("objects").and_then(Value::as_array) {
        Some(objects) => Ok(objects.clone()),
        None => Err(Error::Protocol { url, reason: "its list of uploads has no objects".into() }),
    }
}

/// Sends one file where the store said, unless it is there.
fn transfer(session: &Session, item: &Item, oid: &str, object: Option<&Value>) -> Result<()> {
    let strange = |reason: String| Error::Protocol { url: session.client.settings.endpoint.clone(), reason };
    let object = object.ok_or_else(|| strange(format!("its store says nothing about {}", item.path)))?;
    if let Some(error) = object.get("error") {
        let message = error.get("message").and_then(Value::as_str).unwrap_or("no reason given");
        return Err(strange(format!("its store refuses {}: {message}", item.path)));
    }
    let actions = object.get("actions").and_then(Value::as_object);
    let Some(put) = actions.and_then(|actions| actions.get("upload")) else { return Ok(()) };
    let empty = Map::new();
    let header = put.get("header").and_then(Value::as_object).unwrap_or(&empty);
    let href = |action: &Value| action.get("href").and_then(Value::as_str).map(str::to_owned);
    let to = href(put).ok_or_else(|| strange(format!("its store names no place for {}", item.path)))?;
    let sent = match header.get("chunk_size") {
        None => whole(session, item, header, to),
        Some(size) => parts(session, item, oid, header, size, to),
    };
    sent.map_err(|failure| session.error(failure))?;
    if let Some(verify) = actions.and_then(|actions| actions.get("verify")).and_then(href) {
        let body = json!({ "oid": oid, "size": item.size }).to_string();
        let request = Request::new("POST", verify).header("content-type", "application/json");
        let sent = session.client.send(&request.payload(Payload::Bytes(body.as_bytes())), session.progress);
        sent.map_err(|failure| session.error(failure))?;
    }
    session.progress.finish(&item.path);
    Ok(())
}

fn part(item: &Item, offset: u64, length: u64) -> Payload<'_> {
    match &item.content {
        Content::Disk(path) => Payload::Part { path: path.clone(), offset, length, name: &item.path, total: item.size },
        Content::Text(text) => {
            let (from, to) = (offset as usize, (offset + length) as usize);
            Payload::Bytes(text.as_bytes().get(from..to).unwrap_or_default())
        }
    }
}

/// One request with all of it.
fn whole(session: &Session, item: &Item, header: &Map<String, Value>, to: String) -> Result<(), Failure> {
    let mut request = Request::new("PUT", to).anonymous().payload(part(item, 0, item.size));
    for (name, value) in header {
        request = request.header(name, value.as_str().unwrap_or_default());
    }
    session.client.send(&request, session.progress)?;
    Ok(())
}

/// A request for every part, whose addresses are in the header under their numbers, and one that puts them together.
fn parts(
    session: &Session,
    item: &Item,
    oid: &str,
    header: &Map<String, Value>,
    chunk_size: &Value,
    to: String,
) -> Result<(), Failure> {
    let strange = |reason: String| Failure::Refused(Error::Protocol { url: to.clone(), reason });
    let text = chunk_size.as_str().map(str::to_owned).unwrap_or_else(|| chunk_size.to_string());
    let size = text.parse::<u64>().ok().filter(|&size| size > 0);
    let size = size.ok_or_else(|| strange(format!("chunk_size is '{text}', expected a number of bytes")))?;
    let mut addresses: Vec<(u64, &str)> =
        header.iter().filter_map(|(number, url)| Some((number.parse().ok()?, url.as_str()?))).collect();
    addresses.sort_unstable();
    let expected = item.size.div_ceil(size);
    if addresses.len() as u64 != expected {
        return Err(strange(format!("{} has {expected} parts, there are {} addresses", item.path, addresses.len())));
    }
    let mut done = Vec::with_capacity(addresses.len());
    for (index, (_, address)) in addresses.into_iter().enumerate() {
        let offset = index as u64 * size;
        let length = size.min(item.size - offset);
        let request = Request::new("PUT", address).anonymous().payload(part(item, offset, length));
        let answer = session.client.send(&request, session.progress)?;
        let etag = answer.header("etag").filter(|etag| !etag.is_empty());
        let etag = etag.ok_or_else(|| strange(format!("part {} of {} got no ETag", index + 1, item.path)))?;
        done.push(json!({ "partNumber": index + 1, "etag": etag }));
    }
    let body = json!({ "oid": oid, "parts": done }).to_string();
    let request = Request::new("POST", to).anonymous().header("accept", LFS_JSON).header("content-type", LFS_JSON);
    session.client.send(&request.payload(Payload::Bytes(body.as_bytes())), session.progress)?;
    Ok(())
}
