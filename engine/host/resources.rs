//! The named resources of a run: models, optimizers and data sets. The run owns them; scripts hold handles, so that they
//! outlive a Lua state. Asking twice for a name gives the same object; another definition under a name is an error.

use super::data::DataObject;
use super::model::ModelObject;
use super::optim::OptimizerObject;
use crate::error::{Error, Result};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

/// What a script named.
#[derive(Clone)]
pub enum Resource {
    Model(ModelObject),
    /// With the name of its model.
    Optimizer(OptimizerObject, String),
    Data(DataObject),
}

impl Resource {
    fn kind(&self) -> &'static str {
        match self {
            Self::Model(_) => "model",
            Self::Optimizer(..) => "optimizer",
            Self::Data(_) => "data set",
        }
    }
}

/// A resource and what it was made from.
#[derive(Clone)]
pub struct Named {
    pub resource: Resource,
    /// In words that are equal when the definition is.
    pub definition: String,
}

/// All named resources of a run.
#[derive(Default)]
pub struct Resources(Mutex<BTreeMap<String, Named>>);

impl Resources {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Named>> {
        self.0.lock().expect("no panic happens under this lock")
    }

    /// The resource called `name`, if there is one: of the kind that `wanted` takes out, and of this definition.
    ///
    /// Errors: [`Error::Argument`] if it is of another kind; [`Error::Diverged`] if it was made from something else.
    pub fn find<T>(
        &self,
        op: &'static str,
        kind: &'static str,
        name: &str,
        definition: &str,
        wanted: impl Fn(&Resource) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(known) = self.lock().get(name).cloned() else { return Ok(None) };
        let Some(found) = wanted(&known.resource) else {
            let got = format!("`{name}`, which is a {} of this run", known.resource.kind());
            return Err(Error::argument(op, "name", format!("a name that is free, or that of a {kind}"), got));
        };
        check_definition(kind, name, &known.definition, definition)?;
        Ok(Some(found))
    }

    /// Gives `resource` the free name `name`.
    pub fn add(&self, name: &str, resource: Resource, definition: String) {
        let old = self.lock().insert(name.to_string(), Named { resource, definition });
        assert!(old.is_none(), "the name {name} was free");
    }

    /// All resources by name.
    pub fn all(&self) -> Vec<(String, Named)> {
        self.lock().iter().map(|(name, named)| (name.clone(), named.clone())).collect()
    }

    /// Forgets resources whose names `keep` refuses.
    pub fn retain(&self, keep: impl Fn(&str) -> bool) {
        self.lock().retain(|name, _| keep(name));
    }

    /// The name of `model`.
    pub fn name_of_model(&self, model: &ModelObject) -> Option<String> {
        let is_it = |named: &Named| matches!(&named.resource, Resource::Model(other) if Arc::ptr_eq(&other.model, &model.model));
        self.lock().iter().find(|(_, named)| is_it(named)).map(|(name, _)| name.clone())
    }

    /// Optimizers with their names and those of their models.
    pub fn optimizers(&self) -> Vec<(String, OptimizerObject, String)> {
        let optimizer = |(name, named): (&String, &Named)| match &named.resource {
            Resource::Optimizer(optimizer, model) => Some((name.clone(), optimizer.clone(), model.clone())),
            _ => None,
        };
        self.lock().iter().filter_map(optimizer).collect()
    }

    /// A number that changes with every change of any resource.
    pub fn version(&self) -> u64 {
        let version = |named: &Named| match &named.resource {
            Resource::Model(model) => model.model.version(),
            Resource::Optimizer(optimizer, _) => optimizer.version(),
            Resource::Data(data) => data.version(),
        };
        self.lock().values().map(version).fold(0, u64::wrapping_add)
    }
}

/// Errors: [`Error::Diverged`] if a resource was made from something else than `asked`.
pub fn check_definition(kind: &str, name: &str, made_from: &str, asked: &str) -> Result<()> {
    if made_from == asked {
        return Ok(());
    }
    Err(Error::Diverged {
        what: format!("the {kind} `{name}`"),
        how: format!("it was made from {made_from}, and {asked} is asked for"),
        remedy: "give it a name that is free, or start another run".into(),
    })
}
